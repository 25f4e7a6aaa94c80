"""KV of a prompt arrives whole, in every way a loop may drive the channel."""

from __future__ import annotations

import numpy as np
import pytest

from lanewise.fleet import LinkState
from lanewise.transfer import Committed, Delivered, Granted, Limits, LinkReport, Offered, Sent


def run(net, prefill, decode, key, ids, have=0):
    pages = prefill.compute(ids, seed=len(key[0]))
    decode.receiver.expect(key, ids, net.cache_key)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    prefill.sender.ready(key, len(ids))
    prefill.sender.commit(key, net.token(key))
    return pages


def test_link_is_tested_and_measured(net):
    prefill, decode = net.pair()
    prefill.sender.connect(decode.peer)
    outlets = prefill.sender._thread._ways.outlets
    prefill.log.wait(LinkReport)
    if outlets:
        net.eventually(lambda: (to := outlets.to(decode.address)) and not to._trial, "the direct connection is tested")
    link = prefill.log.of(LinkReport)[-1].link
    assert link.state is LinkState.VERIFIED, link.reason
    assert link.peer == decode.identity.incarnation
    assert link.bandwidth_bytes_per_s > 0
    assert 0 < link.latency_s < 1
    assert decode.log.events == []
    prefill.log.events.clear()  # whoever asks again has forgotten what was found, and is told again
    prefill.sender.connect(decode.peer)
    assert prefill.log.wait(LinkReport).link == link


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500])
def test_one_transfer(net, tokens):
    prefill, decode = net.pair()
    decode.grant_all()
    key, ids = ("r1", 1), list(range(tokens))
    pages = run(net, prefill, decode, key, ids)
    committed = decode.log.wait(Committed, key)
    prefill.log.wait(Delivered, key)
    assert committed.token == net.token(key)
    assert committed.received_tokens == tokens
    assert committed.received_bytes == tokens * net.layout.bytes_per_token
    assert np.array_equal(prefill.kv(pages, range(tokens)), decode.kv(key, range(tokens)))
    assert [type(e) for e in decode.log.events] == [Offered, Committed]
    kinds = [type(e) for e in prefill.log.events if not isinstance(e, LinkReport)]
    assert kinds == [Granted, Sent, Delivered]


def test_many_transfers_at_once_over_stripes(net):
    prefill = net.prefill(limits=Limits(chunk_bytes=2048, stripes=3))
    decodes = [net.decode() for _ in range(2)]
    for decode in decodes:
        decode.grant_all()
    work = []
    for number in range(40):
        decode, ids = decodes[number % 2], list(range(number, number + 20 + number))
        key = (f"request-{number}", 1)
        work.append((decode, key, ids, run(net, prefill, decode, key, ids)))
    for decode, key, ids, pages in work:
        decode.log.wait(Committed, key)
        prefill.log.wait(Delivered, key)
        assert np.array_equal(prefill.kv(pages, range(len(ids))), decode.kv(key, range(len(ids))))
    assert prefill.sender.snapshot().delivered == 40


@pytest.mark.parametrize("have", [64, 128])
def test_prefix_the_receiver_holds_does_not_travel(net, have):
    prefill, decode = net.pair()
    decode.grant_all(have)
    key, ids = ("r1", 1), list(range(150))
    pages = run(net, prefill, decode, key, ids)
    assert prefill.log.wait(Granted, key).have_tokens == have
    committed = decode.log.wait(Committed, key)
    assert committed.received_tokens == 150 - have
    assert committed.received_bytes == (150 - have) * net.layout.bytes_per_token
    assert np.array_equal(prefill.kv(pages, range(have, 150)), decode.kv(key, range(have, 150)))
    assert not decode.kv(key, range(have)).any()
    prefill.log.wait(Delivered, key)
    assert prefill.sender.snapshot().prefix_skipped_tokens == have


def test_whole_prompt_held_by_the_receiver(net):
    prefill, decode = net.pair()
    decode.grant_all(128)
    key = ("r1", 1)
    run(net, prefill, decode, key, list(range(128)))
    assert decode.log.wait(Committed, key).received_bytes == 0
    prefill.log.wait(Delivered, key)


def test_chunks_go_as_layers_and_tokens_become_ready(net):
    prefill, decode = net.pair()
    decode.grant_all()
    key, ids = ("r1", 1), list(range(96))
    pages = prefill.compute(ids)
    decode.receiver.expect(key, ids, net.cache_key)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    prefill.log.wait(Granted, key)
    row = net.layout.slice_bytes(1, 1)
    sent = 0
    for tokens, layers, new in [(32, range(1), 32), (32, range(1, 3), 64), (96, range(2), 128), (96, range(3), 64)]:
        prefill.sender.ready(key, tokens, layers)
        sent += new * row
        net.eventually(lambda sent=sent: decode.store.written == sent, f"{sent} bytes written")
    prefill.sender.commit(key, net.token(key))
    decode.log.wait(Committed, key)
    assert np.array_equal(prefill.kv(pages, range(96)), decode.kv(key, range(96)))
