"""Direct connections: from pages into pages, and never a wrong byte in a page whatever becomes of a connection."""

from __future__ import annotations

import contextlib
import random
import socket
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanewise.policy.blocks import KVLayout
from lanewise.transfer import Aborted, Committed, Counters, Delivered, Drained, Faults, Limits, Timers, compat, direct
from lanewise.transfer import messages as m
from lanewise.transfer.chunks import Slice
from lanewise.transfer.outlet import Outlet
from lanewise.transfer.receiver_core import ReceiverCore
from lanewise.transfer.records import Binding, Endpoint
from lanewise.transfer.trial import Route, Trial

IDS = list(range(400))
LIMITS = Limits(chunk_bytes=8192, referred_bytes=8192, least_piece_bytes=1)


def outlet_of(prefill, decode) -> Outlet | None:
    return prefill.sender._thread._ways.outlets.to(decode.address)


def pair(net, *, in_place=True, limits=LIMITS, **options):
    """Two sides with a direct connection between them, chunks from and into pages where they lie."""
    prefill = net.prefill(limits=limits, **options)
    decode = net.decode(limits=limits, timers=options.get("timers"))
    prefill.store.in_place = decode.store.in_place = in_place
    decode.grant_all()
    prefill.sender.connect(decode.peer)
    net.eventually(lambda: outlet_of(prefill, decode) is not None, "a direct connection")
    return prefill, decode


def begin(net, prefill, decode, key, ids=IDS):
    pages = prefill.compute(ids, key[1])
    decode.receiver.expect(key, ids, net.cache_key)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    prefill.sender.commit(key, net.token(key))
    return pages


def arrives(net, prefill, decode, key, ids=IDS):
    pages = begin(net, prefill, decode, key, ids)
    decode.log.wait(Committed, key)
    prefill.log.wait(Delivered, key)
    assert np.array_equal(prefill.kv(pages, range(len(ids))), decode.kv(key, range(len(ids))))


class Slow:
    """Lets an outlet write no more than so many bytes until it is let go."""

    def __init__(self, outlet: Outlet, num_bytes: int) -> None:
        self._outlet, self._left, self._held = outlet, num_bytes, True
        self._write = outlet._write
        outlet._write = self.write

    def write(self) -> None:
        if not self._held:
            self._write()
            return
        letters = self._outlet._letters
        while self._left and letters:
            sent = self._outlet._sock.send(b"".join(letters.next_parts())[: self._left])
            self._left -= sent
            letters.sent(sent)
        if letters:
            raise BlockingIOError

    def let_go(self) -> None:
        self._held = False


@pytest.mark.parametrize("in_place", [True, False])
def test_chunks_go_from_pages_into_pages(net, in_place):
    prefill, decode = pair(net, in_place=in_place)
    for epoch, tokens in enumerate((1, 64, 400)):
        arrives(net, prefill, decode, ("r", epoch), list(range(tokens)))
    copied = 0 if in_place else 465 * net.layout.bytes_per_token
    assert decode.store.written == copied
    assert decode.receiver.snapshot().bytes_received == 465 * net.layout.bytes_per_token


def test_many_small_pieces_are_gathered(net):
    prefill, decode = pair(net, limits=Limits(chunk_bytes=8192))
    arrives(net, prefill, decode, ("r", 1))
    assert decode.store.written == 400 * net.layout.bytes_per_token


def test_damaged_chunks_come_again_and_leave_nothing_behind(net):
    prefill, decode = pair(net, timers=net.fast, faults=Faults.parse("corrupt:CHUNK:0.3:seed4"))
    for epoch in range(3):
        arrives(net, prefill, decode, ("r", epoch))
    assert decode.receiver.snapshot().chunks_corrupt > 0
    prefill, decode = pair(net, timers=net.fast, faults=Faults.parse("corrupt:CHUNK:1.0"))
    begin(net, prefill, decode, ("r", 1))
    prefill.log.wait(Aborted, ("r", 1))
    decode.log.wait(Aborted, ("r", 1))
    assert decode.receiver.snapshot().chunks_corrupt > 0
    assert not decode.store.pool.any(), "bytes that were never verified are in pages"


def test_a_connection_that_breaks_loses_no_transfer_and_comes_back(net):
    prefill, decode = pair(net)
    seen = []
    whole = decode.store.views

    def views(*where):
        seen.append(where)
        if len(seen) == 3:  # on the receiver's own thread, in the middle of a transfer
            for inlet in decode.receiver._thread._inlets._all:
                inlet.sock.shutdown(socket.SHUT_RDWR)
        return whole(*where)

    decode.store.views = views
    arrives(net, prefill, decode, ("r", 1))
    assert decode.store.written, "nothing went by ZeroMQ"
    net.eventually(lambda: outlet_of(prefill, decode) is not None, "the connection is there again")
    arrives(net, prefill, decode, ("r", 2))


def test_cancel_in_the_middle_of_a_chunk_frees_its_pages_at_once(net):
    prefill, decode = pair(net)
    slow = Slow(outlet_of(prefill, decode), 12_000)
    key = ("r", 1)
    begin(net, prefill, decode, key)
    net.eventually(decode.store.pool.any, "the first bytes are in pages")
    decode.receiver.cancel(key, "test")
    decode.log.wait(Drained, key)
    prefill.log.wait(Aborted, key)
    decode.store.pool[:] = 7  # whoever has the pages now
    slow.let_go()
    arrives(net, prefill, decode, ("r", 2))
    others = np.setdiff1d(np.arange(decode.store.pool.shape[2]), decode.pages["r", 2])
    assert (decode.store.pool[:, :, others] == 7).all(), "a late byte was written"
    assert outlet_of(prefill, decode)._tries == 0, "the connection did not hold"


def test_pages_are_not_read_after_the_end_of_a_transfer(net):
    prefill, decode = pair(net)
    outlet = outlet_of(prefill, decode)
    slow = Slow(outlet, 12_000)
    key = ("r", 1)
    pages = begin(net, prefill, decode, key)
    net.eventually(decode.store.pool.any, "the first bytes are in pages")
    prefill.sender.abort(key, "test")
    prefill.log.wait(Aborted, key)
    left = outlet._letters.next_parts()
    memory = prefill.store.pool
    assert left, "the chunk was not held up"
    assert not any(np.shares_memory(np.frombuffer(part, np.uint8), memory) for part in left)
    prefill.store.pool[:, :, pages] = 99
    slow.let_go()
    decode.log.wait(Aborted, key)
    arrives(net, prefill, decode, ("r", 2))
    assert not (decode.store.pool == 99).all(axis=-1).any()


def test_without_direct_connections_on_one_side_zeromq_carries_all(net):
    prefill = net.prefill(limits=LIMITS)
    net.direct = False
    decode = net.decode(limits=LIMITS)
    decode.grant_all()
    arrives(net, prefill, decode, ("r", 1))
    assert outlet_of(prefill, decode) is None


# --- who may connect


def connect(decode) -> socket.socket:
    thread = decode.receiver._thread
    sock = socket.create_connection(("127.0.0.1", thread._inlets.port), timeout=8)
    sock.settimeout(8)
    return sock


def closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_strangers_are_turned_away(net):
    decode = net.decode(limits=Limits(max_handshakes=3))
    token = decode.receiver._thread._inlets.token("somebody")
    for first in (b"GET / HTTP/1.0\r\n" + bytes(300), direct.greeting(direct.Greeting("another", token)), bytes(400)):
        with connect(decode) as sock:
            sock.sendall(first)
            assert closed(sock)
    silent = [connect(decode) for _ in range(5)]
    assert closed(silent[0])
    assert closed(silent[1])
    assert decode.receiver.snapshot().refused_connections == 3
    good = connect(decode)
    good.sendall(direct.greeting(direct.Greeting("somebody", token)))
    assert good.recv(1) == direct.WELCOME
    for sock in (good, *silent):
        sock.close()


def test_a_stranger_that_says_nothing_is_cut_off(net, monkeypatch):
    monkeypatch.setattr(direct, "SILENT_S", 0.1)
    with connect(net.decode()) as sock:
        assert closed(sock)


def test_rubbish_behind_a_greeting_harms_nobody(net):
    prefill, decode = pair(net)
    dice = random.Random(5)
    chunk = m.Chunk("x", decode.identity.incarnation, "r", 1, 0, 0, 1, 0, 8, 0, 2, bytes(8))
    for number in range(60):
        sock = connect(decode)
        sock.sendall(direct.greeting(direct.Greeting("x", decode.receiver._thread._inlets.token("x"))))
        assert sock.recv(1) == direct.WELCOME
        header = m.encode(chunk) if number % 3 else dice.randbytes(dice.randrange(1, 400))
        lengths = direct.lengths(len(header), dice.choice([0, 5, 5000]))
        lengths = dice.choice([lengths, struct.pack("<II", 5000, 5)])
        with contextlib.suppress(OSError):  # it may have hung up by now
            sock.sendall(lengths + header + dice.randbytes(dice.randrange(6000)))
        sock.close()
    arrives(net, prefill, decode, ("r", 1))


# --- the receiver's core


@pytest.mark.parametrize("other", [Slice(32, 96, 0, 1, 0, 2), Slice(0, 96, 1, 2, 0, 2), Slice(0, 96, 0, 2, 1, 2)])
def test_a_damaged_chunk_over_another_ends_the_transfer(other):
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32", dtype_bytes=4)
    bound, names = Binding.of(list(range(96)), b"k"), ("prefill", "decode", "r", 1)
    good = Slice(0, 64, 0, 1, 0, 1)
    for first_done in (True, False):
        core = ReceiverCore(Endpoint("decode", "f", {}, layout), Timers(), Limits(), Counters())
        core.receive(compat.hello(Endpoint("prefill", "f", {}, layout), "decode"), 0, 0.0)
        core.expect(("r", 1), bound, 0.0)
        core.receive(m.Begin(*names, 96, bound.chain, bound.prompt, 1), 0, 0.0)
        core.grant(("r", 1), ["p"], 0, 0.0)
        for seq, piece in enumerate((good, other)):
            where = (piece.layer_lo, piece.layer_hi, piece.token_lo, piece.token_hi, piece.head_lo, piece.head_hi)
            core.receive(m.Chunk(*names, seq, *where, bytes(8)), piece.nbytes(layout), 0.0)
        if first_done:
            core.wrote(("r", 1), 0, True, 0.0)
        core.wrote(("r", 1), 1, False, 0.0, spoiled=True)
        assert (("r", 1) in core.table.live) is not good.overlaps(other)


@given(st.binary(min_size=direct.GREETING_BYTES, max_size=direct.GREETING_BYTES), st.integers(0, 64 << 20))
def test_any_bytes_are_a_greeting_and_lengths_within_limits_or_refused(data, most):
    for greeting in (data, direct.greeting(direct.Greeting("x", bytes(32)))[:8] + data[8:]):
        with contextlib.suppress(direct.NotASender):
            says = direct.read_greeting(greeting)
            assert len(says.token) == direct.TOKEN_BYTES
            assert len(says.incarnation) <= 255
    with contextlib.suppress(direct.NotASender):
        header, payload = direct.read_lengths(data[: direct.LENGTHS_BYTES], most)
        assert 0 < header <= direct.MAX_HEADER_BYTES
        assert payload <= most


@pytest.mark.parametrize("slow", [False, True])
def test_zeromq_carries_what_a_direct_connection_would_carry_slowly(net, monkeypatch, slow):
    """As in a network that lets the one through at once and the other not: answers to its test blocks come late."""
    if slow:
        real = Trial.heard

        def heard(trial: Trial, ack: m.ProbeAck, now: float) -> bool:
            return real(trial, ack, now + (trial.route is Route.BYTES))

        monkeypatch.setattr(Trial, "heard", heard)
    prefill, decode = pair(net)
    outlets = prefill.sender._thread._ways.outlets
    outlet = outlets._outlets[decode.address]
    net.eventually(lambda: outlet._trial is None, "the ways are tested")
    assert (outlet.route, outlets.to(decode.address)) == ((Route.ZEROMQ, None) if slow else (Route.BYTES, outlet))
    arrives(net, prefill, decode, ("r", 1))
    assert decode.store.written == (len(IDS) * net.layout.bytes_per_token if slow else 0)
    prefill.sender._thread.command(lambda now: outlet._break("test", now))
    net.eventually(lambda: not outlet.up, "broken")
    arrives(net, prefill, decode, ("r", 2))
