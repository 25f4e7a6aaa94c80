"""KV from the memory of one GPU to that of another, between processes: the right bytes or none.

There is no GPU here: a library stands in for its driver and numpy for its kernels (standin_gpu.py). What kernels do is
tested in tests/kernels/test_pieces.py, all together in tests/engine/test_device_memory.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanewise.fleet import LinkState
from lanewise.transfer import (
    Aborted,
    Committed,
    Delivered,
    Drained,
    Faults,
    Limits,
    LinkReport,
    Peer,
    direct,
    ipc_link,
    neighbour,
)
from lanewise.transfer import messages as m
from lanewise.transfer.ipc_link import Mapped, Openings, checked, fitting
from lanewise.transfer.neighbour import MAX_RUNS, NotRuns
from lanewise.transfer.trial import References, Route
from lanewise.transfer.word_sum import word_sum
from tests.transfer.conftest import LAYOUT, NumpyStore
from tests.transfer.held_back import Gate, changed_pages_end_their_transfer, reused_pages_are_never_accepted
from tests.transfer.standin_gpu import StandIn, build, opened
from tests.transfer.test_direct import IDS, LIMITS, arrives, begin, connect, outlet_of

SCRIPT = Path(__file__).with_name("peer_process.py")
ALWAYS = References.ALWAYS
BYTES = 400 * LAYOUT.bytes_per_token

pytestmark = pytest.mark.skipif(not neighbour.place(), reason="no process_vm_readv")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def gpu(library, monkeypatch):
    """Puts a store on a GPU. Both sides live in this process here, and count as neighbours."""
    monkeypatch.setattr(neighbour, "is_own", lambda pid: False)
    monkeypatch.setenv("LANEWISE_STANDIN_OWN", "1")
    return lambda store: StandIn(library, store) and None


def pair(net, gpu, references=ALWAYS, **options):
    prefill = net.prefill(limits=LIMITS, references=references, dress=gpu, **options)
    decode = net.decode(limits=LIMITS, dress=gpu, timers=options.get("timers"))
    decode.grant_all()
    prefill.sender.connect(decode.peer)
    net.eventually(lambda: measured(outlet_of(prefill, decode)), "the ways are tested")
    return prefill, decode


def measured(outlet) -> bool:
    return outlet is not None and outlet._trial is None


def gate_of_copies(device: StandIn) -> Gate:
    gate = Gate()
    device.copy = gate.before(device.copy)
    return gate


def test_chunks_are_copied_from_one_gpu_to_the_other(net, gpu):
    prefill, decode = pair(net, gpu)
    assert outlet_of(prefill, decode).route is Route.REFERENCE
    before = decode.store.device_memory.copied
    for epoch, tokens in enumerate((1, 64, 400)):
        arrives(net, prefill, decode, ("r", epoch), list(range(tokens)))
    seen = prefill.sender.snapshot()
    assert seen.chunks_referred == seen.chunks_sent > 3
    assert decode.store.written == 0, "something came by the host"
    assert decode.store.device_memory.copied - before == seen.bytes_sent == decode.receiver.snapshot().bytes_received


def test_the_way_is_measured(net, gpu):
    prefill, decode = pair(net, gpu, References.AUTO)
    route = outlet_of(prefill, decode).route
    arrives(net, prefill, decode, ("r", 1))
    seen = prefill.sender.snapshot()
    assert seen.chunks_referred == (seen.chunks_sent if route is Route.REFERENCE else 0)


def test_pages_that_were_reused_before_they_were_copied_are_never_accepted(net, gpu):
    prefill, decode = pair(net, gpu)
    reused_pages_are_never_accepted(net, prefill, decode, gate_of_copies(decode.store.device_memory))


def test_pages_that_change_under_a_living_transfer_end_it(net, gpu):
    prefill, decode = pair(net, gpu)
    changed_pages_end_their_transfer(net, prefill, decode, gate_of_copies(decode.store.device_memory))


def test_cancelled_pages_are_free_only_when_no_copy_is_under_way(net, gpu):
    prefill, decode = pair(net, gpu)
    gate = gate_of_copies(decode.store.device_memory)
    begin(net, prefill, decode, ("r", 1))
    assert gate.waiting.wait(8)
    decode.receiver.cancel(("r", 1), "test")
    assert not decode.log.of(Drained)
    gate.open.set()
    decode.log.wait(Drained, ("r", 1))
    copied = decode.store.device_memory.copied
    prefill.log.wait((Aborted, Delivered), ("r", 1))  # all of it may have been at hand before the cancel
    arrives(net, prefill, decode, ("r", 2), IDS[:64])
    more = decode.store.device_memory.copied - copied
    assert more == 64 * net.layout.bytes_per_token, "a page that was given back was written"


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("what", ["copy", "checksum"])
def test_what_a_gpu_refuses_goes_as_bytes(net, gpu, side, what):
    prefill, decode = pair(net, gpu)
    arrives(net, prefill, decode, ("r", 1))
    (prefill if side == "prefill" else decode).store.device_memory.broken.add(what)
    arrives(net, prefill, decode, ("r", 2))
    referred = prefill.sender.snapshot().chunks_referred
    seen = decode.receiver.snapshot()
    if side == "decode":  # which finds out when it copies; the same checksum is then made by both hosts
        assert seen.chunks_corrupt == prefill.sender.snapshot().chunks_resent == referred // 2 > 0
        assert decode.store.written == BYTES
    else:
        assert seen.chunks_corrupt == 0
        assert decode.store.written == (BYTES if what == "checksum" else 0)


@pytest.mark.parametrize("what", ["drop", "duplicate", "corrupt", "truncate", "delay"])
def test_faults_are_made_good(net, gpu, what):
    fault = Faults.parse(f"f={what}@CHUNK#3{':50ms' * (what == 'delay')}")
    prefill, decode = pair(net, gpu, timers=net.fast, faults=fault)
    for epoch in range(3):
        arrives(net, prefill, decode, ("r", epoch))
    assert prefill.sender.snapshot().chunks_referred > 3
    assert decode.receiver.snapshot().malformed == (what in ("corrupt", "truncate"))


def test_a_connection_that_ends_gives_back_what_was_open(net, gpu):
    prefill, decode = pair(net, gpu)
    openings = decode.receiver._thread._inlets._openings
    assert len(openings) == 2
    outlet = outlet_of(prefill, decode)
    prefill.sender._thread.command(lambda now: outlet._break("test", now))
    net.eventually(lambda: not len(openings), "all is closed")
    net.eventually(lambda: outlet.up and len(openings) == 2, "and opened again")
    arrives(net, prefill, decode, ("r", 1))


@pytest.mark.parametrize("on_gpu", ["prefill", "decode"])
def test_memory_of_two_kinds_is_no_neighbourhood(net, gpu, on_gpu):
    """Bytes go between a CPU's pool and a GPU's."""
    side = {on_gpu: {"dress": gpu}}
    prefill = net.prefill(limits=LIMITS, **side.get("prefill", {}))
    decode = net.decode(limits=LIMITS, **side.get("decode", {}))
    decode.grant_all()
    prefill.sender.connect(decode.peer)
    net.eventually(lambda: measured(outlet_of(prefill, decode)), "the ways are tested")
    arrives(net, prefill, decode, ("r", 1))
    assert prefill.sender.snapshot().chunks_referred == 0


@pytest.mark.parametrize("why", ["closed", "lies"])
def test_memory_that_cannot_be_opened_is_no_neighbours(net, gpu, monkeypatch, why):
    """`Auto` goes on with bytes, `IPC` says why there is no link."""

    def refuse(*_: object) -> None:
        raise OSError("peer access is not supported between these two devices")

    if why == "closed":
        monkeypatch.setattr("lanewise.kernels.cuda_ipc.Driver.open", refuse)
    else:
        real = ipc_link.card
        monkeypatch.setattr(ipc_link, "card", lambda device: real(device)[:8] + b"\xff" * 8 + real(device)[16:])
    prefill, decode = pair(net, gpu, References.AUTO)
    arrives(net, prefill, decode, ("r", 1))
    assert prefill.sender.snapshot().chunks_referred == 0
    assert not len(decode.receiver._thread._inlets._openings)
    strict = net.prefill(limits=LIMITS, references=ALWAYS, dress=gpu)
    strict.sender.connect(decode.peer)

    def failed() -> bool:
        return any(report.link.state is LinkState.FAILED for report in strict.log.of(LinkReport))

    net.eventually(failed, "the link fails")
    assert "channel IPC" in strict.log.of(LinkReport)[-1].link.reason


# --- between processes


@pytest.fixture
def far(library):
    made = []

    def start() -> Peer:
        words = [sys.executable, str(SCRIPT), "decode", "far", "tcp://127.0.0.1:0"]
        environment = os.environ | {"LANEWISE_STANDIN": library}
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        made.append(process)
        return Peer(process.stdout.readline().strip(), "far")

    start.processes = made
    yield start
    for process in made:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("references", [References.AUTO, ALWAYS])
def test_another_process_copies_from_this_ones_gpu(net, far, library, references):
    dress = lambda store: StandIn(library, store) and None  # noqa: E731
    prefill = net.prefill(limits=LIMITS, timers=net.steady, references=references, dress=dress)
    peer = far()
    prefill.sender.connect(peer)
    outlets = prefill.sender._thread._ways.outlets
    net.eventually(lambda: measured(outlets.to(peer.kv_address)), "the ways are tested", 20)
    route = outlets.to(peer.kv_address).route
    assert route is Route.REFERENCE or references is not ALWAYS
    ids = list(range(200))
    pages = prefill.compute(ids)
    prefill.sender.begin(("r", 1), peer, ids, net.cache_key, pages)
    prefill.sender.commit(("r", 1), net.token(("r", 1)))
    prefill.log.wait(Delivered, ("r", 1))
    seen = prefill.sender.snapshot()
    assert seen.chunks_referred == (seen.chunks_sent if route is Route.REFERENCE else 0)
    assert prefill.log.of(LinkReport)[-1].link.bandwidth_bytes_per_s > 0
    far.processes[0].kill()
    prefill.sender.begin(("r", 2), peer, ids, net.cache_key, pages)
    prefill.log.wait(Aborted, ("r", 2), 20)


def test_a_prefill_process_that_dies_leaves_nothing_open(net, library, monkeypatch):
    decode = net.decode(limits=LIMITS, timers=net.steady, dress=lambda store: StandIn(library, store) and None)
    decode.grant_all()
    ids = list(range(200))
    decode.receiver.expect(("r", 1), ids, net.cache_key)
    words = [sys.executable, str(SCRIPT), "prefill", decode.address, decode.identity.incarnation]
    environment = os.environ | {"LANEWISE_STANDIN": library}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        decode.log.wait(Committed, ("r", 1), 20)
        net.eventually(lambda: opened(library) == 2, "its memory is open")
        process.kill()
    net.eventually(lambda: opened(library) == 0, "its memory is closed")


# --- strangers and rubbish


def test_references_beyond_what_was_shown_are_counted_and_nothing_is_copied(net, gpu):
    decode = net.decode(dress=gpu)
    mine = NumpyStore(LAYOUT, 4, 8)
    gpu(mine)
    token = decode.receiver._thread._inlets.token("x")
    kept = bytearray(token + ipc_link.card(mine.device_memory))
    pool, size, _, _ = mine.device_memory.exports[0]
    copied = decode.store.device_memory.copied
    outside = ((pool - 4, 4), (pool + size, 4), (pool + size - 4, 8), (pool + 2, 4), (pool, 6), (4096, 4))
    rubbish = [neighbour.packed(np.array([(pool, 4), area], np.uint64)) for area in outside]
    rubbish.append(neighbour.packed(ipc_link.area(pool, decode.store.device_memory.block[1] + 4)))  # no test's size

    def say(sock: socket.socket, runs: bytes, payload: bytes = b"") -> None:
        header = m.encode(m.Probe("x", decode.identity.incarnation, 1, bytes(8), runs))
        sock.sendall(direct.lengths(len(header), len(payload)) + header + payload)

    with connect(decode) as sock:
        sock.sendall(direct.greeting(direct.Greeting("x", token, os.getpid(), neighbour.address_of(kept))))
        assert sock.recv(1) == direct.WELCOME_READS
        for runs in rubbish:
            say(sock, runs)
        net.eventually(lambda: decode.receiver.snapshot().malformed == len(rubbish), "all are counted")
        assert decode.store.device_memory.copied == copied
        say(sock, neighbour.packed(ipc_link.area(pool, 64)))
        net.eventually(lambda: decode.store.device_memory.copied == copied + 64, "the connection goes on")


def test_allocations_are_opened_once_and_closed_by_their_last_user(gpu):
    store = NumpyStore(LAYOUT, 4, 8)
    gpu(store)
    device = store.device_memory
    openings, shown = Openings(device), ipc_link.card(device)
    first, second = Mapped(openings, shown), Mapped(openings, shown)
    assert opened(device.library) == len(openings) == 2
    address, size, _, _ = device.exports[0]
    here = first.here(ipc_link.area(address + 8, size - 8))
    assert here[0, 0] != address + 8
    store.pool.reshape(-1)[8:12] = 1, 2, 3, 4
    assert device._bytes(here)[:4] == b"\x01\x02\x03\x04"
    first.close()
    assert opened(device.library) == 2
    assert (second.here(ipc_link.area(address + 8, 4)) == here[:, :1]).any()
    with pytest.raises(NotRuns):
        first.here(ipc_link.area(address, 4))
    second.close()
    assert opened(device.library) == len(openings) == 0


# --- the device and its checksum


@pytest.mark.parametrize("fault", ["sum", "copy", "wipe", "error"])
def test_a_gpu_that_gets_it_wrong_is_not_used(gpu, fault):
    store = NumpyStore(LAYOUT, 4, 8)
    gpu(store)
    device = store.device_memory
    assert checked(device) is device
    if fault == "error":
        device.broken.add("copy")
    elif fault == "sum":
        real = device.checksum
        device.checksum = lambda areas: real(areas) + 1
    else:
        setattr(device, fault, lambda *areas: None)
        if fault == "copy":
            device.fill = lambda data: type(device).fill(device, data)
    assert checked(device) is None
    assert checked(None) is None


@given(st.binary(max_size=64).map(lambda data: data[: len(data) & ~3]))
def test_the_sum_is_of_words_mixed_with_their_places(data):
    mask, total = (1 << 64) - 1, 0
    for place in range(len(data) // 4):
        x = place << 32 | int.from_bytes(data[4 * place : 4 * place + 4], "little")
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        total += x ^ x >> 31
    assert word_sum(data) == (total & mask).to_bytes(8, "little")


def test_no_small_damage_leaves_the_sum_as_it_was():
    data = np.random.default_rng(0).integers(0, 256, 4 << 17, np.uint8)  # more than one step
    seen = {word_sum(data.tobytes())}
    for bit in range(0, data.nbytes * 8, 99991):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(word_sum(data.tobytes()))
        data[bit // 8] ^= 1 << bit % 8
    words = data.view(np.uint32)
    for first, second in ((0, 1), (5, 70000), (65535, 65536)):
        words[[first, second]] = words[[second, first]]
        seen.add(word_sum(data.tobytes()))
        words[[first, second]] = words[[second, first]]
    assert len(seen) == 1 + len(range(0, data.nbytes * 8, 99991)) + 3
    assert word_sum(bytes(8)) != word_sum(bytes(12))
    with pytest.raises(ValueError, match="no whole words"):
        word_sum(b"12345")


@given(first=st.integers(0, 300), seed=st.integers(0, 99))
def test_a_chunk_of_the_fitting_size_never_has_too_many_pieces(first, seed):
    """Scattered pages, any start, as many tokens or layers as the limit allows."""

    class Store:
        layout = LAYOUT
        device_memory = type("D", (), {"piece_bytes": 8 * LAYOUT.slice_bytes(1, 1) // 2})  # pages of 8 tokens

    most = fitting(Limits(), Store()).referred_bytes
    assert most < Limits().referred_bytes
    dice = np.random.default_rng(seed)
    layers = int(dice.integers(1, LAYOUT.num_layers + 1))
    tokens = most // LAYOUT.slice_bytes(1, layers)
    pages = (first + tokens - 1) // 8 - first // 8 + 1
    assert 2 * layers * pages <= MAX_RUNS
