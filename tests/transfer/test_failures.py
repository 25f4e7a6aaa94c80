"""What goes wrong in life: wrong partners, wrong prompts, full or slow or dead receivers, rubbish from the network."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import numpy as np
import pytest
import zmq

from lanewise.fleet import LinkState
from lanewise.policy.blocks import KVLayout
from lanewise.transfer import (
    Aborted,
    Busy,
    Committed,
    Delivered,
    Drained,
    Granted,
    Limits,
    LinkReport,
    Offered,
    Peer,
    Receiver,
    Sender,
    Sent,
)
from lanewise.transfer import messages as m
from lanewise.transfer.faults import Faults

KEY = ("r", 1)
IDS = list(range(200))


def start(net, prefill, decode, key=KEY, ids=IDS, ready=None, commit=True):
    pages = prefill.compute(ids)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    if ready is not None:
        prefill.sender.ready(key, ready)
    if commit:
        prefill.sender.commit(key, net.token(key))
    return pages


# --- partners that do not fit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"fingerprint": "e" * 64, "fingerprint_fields": {"protocol": "1", "weights": "xyz", "tokenizer": "t" * 90}},
            ["kv_dtype: float32 here, absent there", "weights: abc here, xyz there", "tokenizer: absent here, ttt"],
        ),
        ({"fingerprint": "e" * 64}, ["fingerprint: ffff", "there"]),
        (
            {"layout": KVLayout(3, 4, 8, "float16", 2)},
            ["layout.num_kv_heads: 2 here, 4 there", "layout.dtype: float32"],
        ),
    ],
)
def test_wrong_fingerprint_or_layout_is_refused_naming_what_differs(net, change, words):
    prefill, decode = net.prefill(net.endpoint(**change)), net.decode()
    decode.receiver.expect(KEY, IDS, net.cache_key)
    start(net, prefill, decode)
    aborted = prefill.log.wait(Aborted, KEY)
    assert aborted.fingerprint_mismatch
    link = prefill.log.wait(LinkReport).link
    assert link.state is LinkState.FAILED
    for word in words:
        assert word in aborted.reason
        assert word in link.reason
    assert "t" * 60 not in aborted.reason
    assert decode.log.events == []


def test_a_link_that_failed_is_tried_again_and_heals(net):
    first = net.decode(timers=net.fast)
    prefill = net.prefill(timers=net.fast)
    first.receiver.close(0)
    prefill.sender.connect(first.peer)
    assert prefill.log.wait(LinkReport).link.state is LinkState.FAILED
    again = net.decode(first.identity, timers=net.fast, listen=first.address)
    net.eventually(
        lambda: prefill.log.of(LinkReport)[-1].link.state is LinkState.VERIFIED, "the link is verified by itself"
    )
    again.grant_all()
    again.receiver.expect(KEY, IDS, net.cache_key)
    start(net, prefill, again)
    prefill.log.wait(Delivered, KEY)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "tcp://:x"])
def test_address_where_nobody_is(net, address):
    prefill = net.prefill(timers=net.fast)
    pages = prefill.compute(IDS)
    prefill.sender.begin(KEY, Peer(address, "somebody"), IDS, net.cache_key, pages)
    aborted = prefill.log.wait(Aborted, KEY)
    assert "HELLO" in aborted.reason or "cannot connect" in aborted.reason
    assert prefill.log.wait(LinkReport).link.state is LinkState.FAILED


def test_stale_incarnation_is_told_and_the_new_one_served(net):
    prefill, decode = net.pair()
    decode.grant_all()
    old = Peer(decode.address, "an incarnation of yesterday")
    pages = prefill.compute(IDS)
    prefill.sender.begin(KEY, old, IDS, net.cache_key, pages)
    assert prefill.log.wait(Aborted, KEY) == Aborted(KEY, "stale incarnation")
    again = ("r", 2)
    decode.receiver.expect(again, IDS, net.cache_key)
    prefill.sender.begin(again, decode.peer, IDS, net.cache_key, pages)
    prefill.sender.commit(again, net.token(again))
    prefill.log.wait(Delivered, again)


# --- content binding


@pytest.mark.parametrize(
    ("ids", "key"),
    [
        ([*IDS[:-1], 7], b"k" * 32),  # the last token, after the last full unit
        ([9, *IDS[1:]], b"k" * 32),
        (IDS[:-1], b"k" * 32),
        ([*IDS, 1], b"k" * 32),
        (IDS, b"another tenant, another model...."[:32]),
    ],
)
def test_kv_of_another_prompt_is_never_accepted(net, ids, key):
    prefill, decode = net.pair()
    decode.grant_all()
    decode.receiver.expect(KEY, ids, key)
    start(net, prefill, decode)
    assert "content" in prefill.log.wait(Aborted, KEY).reason
    assert "content" in decode.log.wait(Aborted, KEY).reason
    assert not decode.log.of(Offered)
    assert not decode.store.pool.any()


def test_begin_before_submit_is_held(net):
    prefill, decode = net.pair(timers=net.fast)
    decode.grant_all()
    start(net, prefill, decode)
    held = decode.receiver._thread.core
    net.eventually(lambda: held.live == 1, "BEGIN has arrived")
    decode.receiver.expect(KEY, IDS, net.cache_key)
    prefill.log.wait(Delivered, KEY)
    other = ("never submitted", 1)
    start(net, prefill, decode, other)
    assert prefill.log.wait(Aborted, other).reason == "no such request here"
    assert not decode.log.of(Aborted)


# --- the loop's answers


def test_busy_and_refused(net):
    prefill, decode = net.pair()
    for number, busy in enumerate([True, False]):
        key = (f"r{number}", 1)
        decode.receiver.expect(key, IDS, net.cache_key)
        start(net, prefill, decode, key)
        decode.log.wait(Offered, key)
        decode.receiver.refuse(key, busy, "draining", 0.25)
    assert prefill.log.wait(Busy).retry_after_s == 0.25
    assert prefill.log.wait(Aborted, ("r1", 1)).reason == "draining"
    assert prefill.sender.snapshot().busy == 1


def test_arguments_that_cannot_be_are_refused_at_once(net):
    prefill, decode = net.pair()
    with pytest.raises(ValueError, match="multiple of 64"):
        decode.receiver.grant(KEY, [], 63)
    for ids in ([], [-1], [2**32], ["x"]):
        with pytest.raises(ValueError, match=r"token ids|prompt of"):
            prefill.sender.begin(KEY, decode.peer, ids, net.cache_key, [])
        with pytest.raises(ValueError, match=r"token ids|prompt of"):
            decode.receiver.expect(KEY, ids, net.cache_key)
    with pytest.raises(ValueError, match="name of a transfer"):
        decode.receiver.expect(("", 1), IDS, net.cache_key)


def test_grant_beyond_the_prompt_ends_the_transfer(net):
    prefill, decode = net.pair()
    decode.grant_all(256)
    decode.receiver.expect(KEY, IDS, net.cache_key)
    start(net, prefill, decode)
    assert "have_tokens=256 of 200" in decode.log.wait(Aborted, KEY).reason
    prefill.log.wait(Aborted, KEY)


def test_token_of_another_request_cannot_be_committed(net):
    prefill, decode = net.pair()
    decode.grant_all()
    decode.receiver.expect(KEY, IDS, net.cache_key)
    start(net, prefill, decode, commit=False)
    prefill.log.wait(Granted, KEY)
    prefill.sender.commit(KEY, net.token(("other", 1)))
    assert "another request" in prefill.log.wait(Aborted, KEY).reason
    decode.log.wait(Aborted, KEY)


# --- credit, cancel, close


def test_slow_receiver_never_gets_more_than_its_credit(net):
    limits = Limits(chunk_bytes=1024, max_chunk_bytes=2048, window_bytes=8192)
    prefill, decode = net.pair(limits=limits)
    decode.grant_all()
    gate, peak = threading.Event(), [0]

    def slowly() -> None:
        gate.wait(5)
        peak[0] = max(peak[0], prefill.sender.snapshot().bytes_sent - decode.store.written)

    decode.store.before_write = slowly
    decode.receiver.expect(KEY, IDS, net.cache_key)
    pages = start(net, prefill, decode)
    net.eventually(lambda: prefill.sender.snapshot().bytes_sent > 6144, "the window is used")
    gate.set()
    prefill.log.wait(Delivered, KEY)
    assert 6144 < peak[0] <= 8192
    assert np.array_equal(prefill.kv(pages, range(200)), decode.kv(KEY, range(200)))


STATES = ["expected", "offered", "granted", "receiving", "verifying", "committed"]


@pytest.mark.parametrize("state", STATES)
def test_cancel_in_every_state(net, state):
    faults = Faults.parse("drop:CHUNK:1.0") if state == "verifying" else None
    prefill, decode = net.prefill(faults=faults), net.decode()
    if state != "offered":
        decode.grant_all()
    decode.receiver.expect(KEY, IDS, net.cache_key)
    thread = decode.receiver._thread
    if state != "expected":
        commit = state in ("verifying", "committed")
        start(net, prefill, decode, ready=64 if state == "receiving" else None, commit=commit)
        transfers = thread.core.table.live
        if commit:
            prefill.log.wait(Delivered if state == "committed" else Sent, KEY)
        if state != "committed":
            net.eventually(lambda: KEY in transfers and transfers[KEY].state == state, state)
    decode.receiver.cancel(KEY, "client left")
    decode.log.wait(Drained, KEY)
    written = decode.store.written
    if state not in ("expected", "committed"):
        assert "client left" in prefill.log.wait(Aborted, KEY).reason
    if state == "expected":
        start(net, prefill, decode)
        assert "client left" in prefill.log.wait(Aborted, KEY).reason
    if state == "receiving":
        prefill.sender.ready(KEY, 200)
    decode.receiver.cancel(KEY, "again")
    net.eventually(lambda: len(decode.log.of(Drained, KEY)) == 2, "cancel again is answered again")
    assert decode.store.written == written
    assert thread.core.live == 0
    assert not decode.log.of(Aborted)


def test_drained_comes_after_the_copy_under_way(net):
    prefill, decode = net.pair()
    decode.grant_all()
    entered, gate = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        gate.wait(5)

    decode.store.before_write = block
    decode.receiver.expect(KEY, IDS, net.cache_key)
    # No COMMIT: in the turn that the copy holds up it could be read before the command, and end the transfer well.
    start(net, prefill, decode, ready=len(IDS), commit=False)
    assert entered.wait(5)
    decode.receiver.cancel(KEY, "client left")
    assert not decode.log.of(Drained)
    gate.set()
    decode.log.wait(Drained, KEY)
    written = decode.store.written
    prefill.log.wait(Aborted, KEY)
    assert decode.store.written == written


def test_close_of_the_sender_ends_everything_and_tells(net):
    prefill, decode = net.pair()
    decode.grant_all()
    decode.receiver.expect(KEY, IDS, net.cache_key)
    start(net, prefill, decode, ready=100, commit=False)
    prefill.log.wait(Granted, KEY)
    prefill.sender.close(5.0)
    assert prefill.log.wait(Aborted, KEY, 0.1).reason == "the prefill worker is closing"
    assert "closing" in decode.log.wait(Aborted, KEY).reason
    late = ("late", 1)
    prefill.sender.begin(late, decode.peer, IDS, net.cache_key, [])
    assert prefill.log.wait(Aborted, late, 0.1).reason == "the prefill worker is closing"
    prefill.sender.ready(late, 1)
    prefill.sender.abort(late, "again")
    prefill.sender.connect(decode.peer)


def test_close_of_the_receiver_ends_everything_and_tells(net):
    prefill, decode = net.pair()
    decode.grant_all()
    decode.receiver.expect(KEY, IDS, net.cache_key)
    start(net, prefill, decode, ready=100, commit=False)
    prefill.log.wait(Granted, KEY)
    decode.receiver.close(5.0)
    assert "closing" in decode.log.wait(Aborted, KEY, 0.1).reason
    assert "closing" in prefill.log.wait(Aborted, KEY).reason
    late = ("late", 1)
    decode.receiver.expect(late, IDS, net.cache_key)
    decode.receiver.grant(late, [], 0)
    decode.receiver.cancel(late, "again")
    assert "closing" in decode.log.wait(Aborted, late, 0.1).reason
    decode.log.wait(Drained, late, 0.1)


def test_close_without_start(net):
    identity = net.endpoint()
    Sender(identity, net.prefill().store, print).close()
    Receiver(identity, net.decode().store, print).close()


def test_pool_that_fails_ends_that_transfer_only(net):
    prefill, decode = net.pair()
    decode.grant_all()

    def fail() -> None:
        raise MemoryError("no such page")

    decode.store.before_write = fail
    decode.receiver.expect(KEY, IDS, net.cache_key)
    start(net, prefill, decode)
    assert "no such page" in decode.log.wait(Aborted, KEY).reason
    assert "no such page" in prefill.log.wait(Aborted, KEY).reason
    decode.store.before_write = lambda: None
    bad, good = ("bad", 1), ("good", 1)
    decode.receiver.expect(bad, IDS, net.cache_key)
    decode.receiver.expect(good, IDS, net.cache_key)
    prefill.sender.begin(bad, decode.peer, IDS, net.cache_key, [0])  # too few pages: reading fails
    prefill.sender.commit(bad, net.token(bad))
    start(net, prefill, decode, good)
    assert "reading pages" in prefill.log.wait(Aborted, bad).reason
    prefill.log.wait(Delivered, good)
    decode.log.wait(Committed, good)


# --- rubbish


def test_ten_megabytes_of_garbage_from_strangers(net):
    prefill, decode = net.pair()
    decode.grant_all()
    host, port = decode.address.removeprefix("tcp://").split(":")
    context = zmq.Context()
    noise = os.urandom(10 << 20)
    try:
        with socket.create_connection((host, int(port))) as raw:
            raw.settimeout(2)
            with contextlib.suppress(OSError):  # the ROUTER hangs up, as it should
                raw.sendall(noise)
        stranger = context.socket(zmq.DEALER)
        named = context.socket(zmq.DEALER)
        named.setsockopt(zmq.ROUTING_ID, b"somebody/c")
        for sock in (stranger, named):
            sock.setsockopt(zmq.LINGER, 0)
            sock.connect(decode.address)
            for at in range(0, 5 << 20, 1 << 20):
                sock.send_multipart([noise[at : at + 1000], noise[at : at + (1 << 20)]])
            sock.send_multipart([b""])
            sock.send_multipart([b"x"] * 500)
        forged = m.Hello("somebody else", decode.identity.incarnation, 1, "f", {}, m.WireLayout(1, 1, 1, "x", 1))
        named.send(m.encode(forged))
        named.send(m.encode(m.Probe("somebody", decode.identity.incarnation, 1, bytes(8))))
        net.eventually(lambda: decode.receiver.snapshot().malformed >= 16, "all of it was read and thrown away")
        named.send(noise)  # beyond MAXMSGSIZE: the connection is dropped
        decode.receiver.expect(KEY, IDS, net.cache_key)
        pages = start(net, prefill, decode)
        prefill.log.wait(Delivered, KEY)
        assert np.array_equal(prefill.kv(pages, range(200)), decode.kv(KEY, range(200)))
    finally:
        context.destroy(linger=0)
