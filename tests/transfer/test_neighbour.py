"""A decode worker reads chunks from the prefill worker's memory: the right bytes or none, whatever it holds by then."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanewise.fleet import LinkState
from lanewise.transfer import Delivered, Faults, Limits, LinkReport, Peer, direct, neighbour
from lanewise.transfer import messages as m
from lanewise.transfer.neighbour import Neighbour, NotRuns, Reading, pack, unpack
from lanewise.transfer.trial import References, Route
from tests.transfer.held_back import Gate, changed_pages_end_their_transfer, reused_pages_are_never_accepted
from tests.transfer.test_direct import IDS, LIMITS, arrives, begin, connect, outlet_of

SCRIPT = Path(__file__).with_name("peer_process.py")
ALWAYS = References.ALWAYS

pytestmark = pytest.mark.skipif(not neighbour.place(), reason="no process_vm_readv")


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides live in this process here, and count as neighbours."""
    monkeypatch.setattr(neighbour, "is_own", lambda pid: False)


def refers(outlet) -> bool:
    return outlet is not None and outlet.route is Route.REFERENCE


def pair(net, *, in_place=True, limits=LIMITS, **options):
    prefill = net.prefill(limits=limits, references=ALWAYS, **options)
    decode = net.decode(limits=limits, timers=options.get("timers"))
    prefill.store.in_place, decode.store.in_place = True, in_place
    decode.grant_all()
    prefill.sender.connect(decode.peer)
    net.eventually(lambda: refers(outlet_of(prefill, decode)), "references")
    return prefill, decode


def gate_of_reads(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(Neighbour, "read", gate.before(Neighbour.read))
    return gate


@pytest.mark.parametrize("in_place", [True, False])
def test_chunks_are_read_from_the_senders_pages(net, near, in_place):
    prefill, decode = pair(net, in_place=in_place)
    for epoch, tokens in enumerate((1, 64, 400)):
        arrives(net, prefill, decode, ("r", epoch), list(range(tokens)))
    assert decode.store.written == (0 if in_place else 465 * net.layout.bytes_per_token)
    seen = prefill.sender.snapshot()
    assert seen.chunks_referred == seen.chunks_sent > 0
    assert decode.receiver.snapshot().bytes_received == seen.bytes_sent


def test_pages_that_were_reused_before_they_were_read_are_never_accepted(net, near, monkeypatch):
    prefill, decode = pair(net)
    reused_pages_are_never_accepted(net, prefill, decode, gate_of_reads(monkeypatch))


def test_pages_that_change_under_a_living_transfer_end_it(net, near, monkeypatch):
    prefill, decode = pair(net)
    changed_pages_end_their_transfer(net, prefill, decode, gate_of_reads(monkeypatch))


def test_what_cannot_be_read_goes_by_the_connection(net, near, monkeypatch):
    prefill, decode = pair(net)

    def read(*_: object) -> None:
        raise OSError("not allowed")

    monkeypatch.setattr(Neighbour, "read", read)
    arrives(net, prefill, decode, ("r", 1))
    seen = prefill.sender.snapshot()
    assert seen.chunks_resent == seen.chunks_referred > 0
    assert decode.receiver.snapshot().chunks_corrupt == seen.chunks_referred


@pytest.mark.parametrize("what", ["drop", "duplicate", "corrupt", "truncate", "delay"])
def test_faults_of_references_are_made_good(net, near, what):
    prefill, decode = pair(net, timers=net.fast, faults=Faults.parse(f"f={what}@CHUNK#3{':50ms' * (what == 'delay')}"))
    for epoch in range(3):
        arrives(net, prefill, decode, ("r", epoch))
    assert prefill.sender.snapshot().chunks_referred > 3
    assert decode.receiver.snapshot().malformed == (what in ("corrupt", "truncate"))


def test_references_wait_for_acknowledgements(net, near, monkeypatch):
    limits = Limits(chunk_bytes=8192, referred_bytes=8192, least_piece_bytes=1, window_bytes=16384)
    prefill, decode = pair(net, limits=limits)
    gate = gate_of_reads(monkeypatch)
    for epoch in range(8):
        begin(net, prefill, decode, (f"r{epoch}", 1))
    net.eventually(lambda: prefill.sender.snapshot().chunks_referred == 2, "a window is on its way")
    assert gate.waiting.wait(8)
    gate.open.set()
    for epoch in range(8):
        prefill.log.wait(Delivered, (f"r{epoch}", 1))


def test_a_chunk_that_is_too_large_for_bytes_by_usual_goes_again_as_bytes(net, near, monkeypatch):
    """References may be of more than `chunk_bytes`; where they cannot be read, the same chunk comes by the network."""
    limits = Limits(chunk_bytes=8192, referred_bytes=1 << 20, least_piece_bytes=1)
    prefill, decode = pair(net, limits=limits)
    arrives(net, prefill, decode, ("r", 1), IDS[:96])
    assert (prefill.sender.snapshot().chunks_sent, prefill.sender.snapshot().chunks_referred) == (1, 1)

    def refuse(*args: object) -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr(Neighbour, "read", refuse)
    arrives(net, prefill, decode, ("r", 2), IDS[96:192])
    seen = prefill.sender.snapshot()
    assert (seen.chunks_sent, seen.chunks_referred, seen.chunks_resent) == (3, 2, 1)
    assert decode.receiver.snapshot().chunks_corrupt == 1


# --- between processes


@pytest.fixture
def far() -> Iterator[Peer]:
    words = [sys.executable, str(SCRIPT), "decode", "far", "tcp://127.0.0.1:0"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield Peer(process.stdout.readline().strip(), "far")
    process.kill()
    process.communicate()


@pytest.mark.parametrize("references", [References.AUTO, ALWAYS])
def test_another_process_reads_this_ones_memory(net, far, references):
    prefill = net.prefill(limits=LIMITS, timers=net.steady, references=references)
    prefill.store.in_place = True
    prefill.sender.connect(far)
    net.eventually(lambda: prefill.sender._thread._ways.outlets.to(far.kv_address), "a direct connection", 20)
    outlet = prefill.sender._thread._ways.outlets.to(far.kv_address)
    net.eventually(lambda: outlet._trial is None, "the ways are tested", 20)
    ids = list(range(200))
    pages = prefill.compute(ids)
    prefill.sender.begin(("r", 1), far, ids, net.cache_key, pages)
    prefill.sender.commit(("r", 1), net.token(("r", 1)))
    prefill.log.wait(Delivered, ("r", 1))
    seen = prefill.sender.snapshot()
    assert seen.chunks_referred == (seen.chunks_sent if outlet.route is Route.REFERENCE else 0)
    assert outlet.route is Route.REFERENCE or references is not ALWAYS
    assert prefill.log.of(LinkReport)[-1].link.bandwidth_bytes_per_s > 0


@pytest.mark.parametrize("why", ["far", "no", "zmq"])
def test_a_link_that_demands_references_fails_without(net, near, monkeypatch, why):
    if why == "no":
        monkeypatch.setattr(Neighbour, "known_by", lambda *_: None)
    net.direct = why != "zmq"
    decode = net.decode(limits=LIMITS)
    net.direct = True
    if why == "far":
        decode.receiver._thread._inlets.place = b"another host"
    prefill = net.prefill(limits=LIMITS, references=ALWAYS)
    for count in (1, 2):  # whoever asks again is told again
        prefill.sender.connect(decode.peer)

        def failures() -> list[LinkReport]:
            return [report for report in prefill.log.of(LinkReport) if report.link.state is LinkState.FAILED]

        net.eventually(lambda count=count: len(failures()) == count, "the link fails")
        assert "channel IPC" in failures()[-1].link.reason


# --- strangers and rubbish


def test_nobody_is_read_because_a_stranger_says_so(net, near):
    decode = net.decode()
    token = decode.receiver._thread._inlets.token("x")
    kept = bytearray(token)
    address = neighbour.address_of(kept)
    for pid, at, said in (
        (os.getpid(), address, direct.WELCOME_READS),
        (os.getpid(), address + 1, direct.WELCOME),
        (os.getppid(), address, direct.WELCOME),
        (2**31 - 1, address, direct.WELCOME),
        (-1, address, direct.WELCOME),
        (os.getpid(), 2**64 - 1, direct.WELCOME),
    ):
        with connect(decode) as sock:
            sock.sendall(direct.greeting(direct.Greeting("x", token, pid, at)))
            assert sock.recv(1) == said
    assert Neighbour.known_by(os.getpid(), address, token)


def test_no_process_is_its_own_neighbour():
    kept = bytearray(os.urandom(32))
    assert Neighbour.known_by(os.getpid(), neighbour.address_of(kept), bytes(kept)) is None


def test_rubbish_for_references_is_counted_and_the_connection_goes_on(net, near):
    decode = net.decode()
    token = decode.receiver._thread._inlets.token("x")
    kept, block = bytearray(token), bytearray(os.urandom(4096))
    good = pack([block])
    rubbish = (
        (good[:-1], b""),
        (good + bytes(neighbour.RUN_BYTES), b""),
        (good, b"x"),
        (b"\xff" * neighbour.RUN_BYTES, b""),
    )
    fine = ((good, b""), (good * neighbour.MAX_RUNS, b""))

    def say(sock: socket.socket, runs: bytes, payload: bytes) -> None:
        header = m.encode(m.Probe("x", decode.identity.incarnation, 1, bytes(8), runs))
        sock.sendall(direct.lengths(len(header), len(payload)) + header + payload)

    read = direct.Greeting("x", token, os.getpid(), neighbour.address_of(kept))
    for greeting, counted in ((read, 4), (direct.Greeting("x", token), 6)):
        before = decode.receiver.snapshot().malformed
        with connect(decode) as sock:
            sock.sendall(direct.greeting(greeting))
            sock.recv(1)
            for runs, payload in (*fine, *rubbish):
                say(sock, runs, payload)
            net.eventually(lambda n=before + counted: decode.receiver.snapshot().malformed == n, "all are counted")


@given(st.binary(max_size=neighbour.MAX_RUNS * neighbour.RUN_BYTES + 24), st.integers(0, 64 << 20))
def test_any_bytes_are_references_within_limits_or_refused(data, most):
    with contextlib.suppress(NotRuns):
        areas, total = unpack(data, most)
        assert 0 < total <= most
        assert total == sum(int(length) for _, length in areas)
        assert 0 < len(areas) <= neighbour.MAX_RUNS


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_references_name_what_was_packed(lengths):
    parts = [memoryview(bytearray(os.urandom(length))) for length in lengths]
    areas, total = unpack(pack(parts), 1 << 20)
    into = bytearray(total)
    Neighbour(os.getpid()).read(areas, [memoryview(into)], total)
    assert bytes(into) == b"".join(parts)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.lists(st.integers(1, 70), min_size=1))
def test_references_can_be_read_in_any_steps(lengths, steps):
    parts = [memoryview(bytearray(os.urandom(length))) for length in lengths]
    areas, total = unpack(pack(parts), 1 << 20)
    reading, into, at = Reading(Neighbour(os.getpid()), areas, total), memoryview(bytearray(total)), 0
    for step in itertools.cycle(steps):
        half = into[at : at + step // 2], into[at + step // 2 : at + step]
        reading.fill([part for part in half if len(part)])
        at = min(at + step, total)
        if at == total:
            break
    assert bytes(into) == b"".join(parts)
    with pytest.raises(OSError, match="that were referred to"):
        reading.fill([memoryview(bytearray(1))])


def test_memory_that_is_not_there_is_an_error():
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    areas, total = unpack(pack([memoryview(memory)]), 1 << 20)
    areas = areas.copy()
    areas[0, 0] = 8192  # never mapped
    with pytest.raises(OSError, match="Bad address"):
        Neighbour(os.getpid()).read(areas, [memoryview(bytearray(total))], total)
    short = areas.copy()
    short[0] = neighbour.address_of(memoryview(memory)), 10
    with pytest.raises(OSError, match="10 bytes could be read"):
        Neighbour(os.getpid()).read(short, [memoryview(bytearray(11))], 11)
