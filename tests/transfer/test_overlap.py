"""Layers announced while later ones compute: group sizes, and that each layer of each sequence is announced once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lanewise.policy.blocks import KVLayout
from lanewise.prefill_worker.overlap import Overlap
from lanewise.transfer import Committed, Delivered, Limits
from lanewise.transfer.grouping import GROUP_BYTES, GROUP_S, WHOLE_S, group_ends

QWEN = KVLayout(num_layers=28, num_kv_heads=4, head_dim=128, dtype="bfloat16", dtype_bytes=2)
WIDE = KVLayout(num_layers=12, num_kv_heads=8, head_dim=256, dtype="bfloat16", dtype_bytes=2)


def sizes(layout: KVLayout, tokens: int, rate: float, layers_sent: float = 0.0) -> list[int]:
    ends = group_ends(layout, tokens, rate, layers_sent)
    return [high - low for low, high in pairwise((0, *ends))]


def test_short_transfers_go_whole_and_long_ones_in_groups_of_layers():
    assert sizes(QWEN, 16, 1e9) == [28]
    assert sizes(QWEN, 32, 1e9) == [28]  # 1.8 MB: 1.8 ms
    assert len(sizes(QWEN, 256, 1e9)) > 3
    assert sizes(WIDE, 512, 1e9) == [1] * 12
    assert sizes(WIDE, 512, 0.0) == [1] * 12  # a link that was not measured counts as 1 GB/s
    assert sizes(QWEN, 512, 1e11) == [28]  # a fast link: 29 MB are over in 0.3 ms


def test_what_can_be_sent_while_the_rest_is_computed_goes_together():
    assert sizes(WIDE, 512, 1e9, 1.0) == [1] * 12  # as fast as it is computed: it must begin at once
    assert sizes(WIDE, 512, 1e9, 4.0) == [5, 4, 2, 1]
    assert sizes(WIDE, 512, 1e9, 100.0) == [7, 4, 1]  # never so much that an estimate could do much harm


@given(
    tokens=st.integers(1, 4096),
    rate=st.floats(1e6, 1e12),
    layers=st.integers(1, 80),
    layers_sent=st.floats(0, 1e6),
)
def test_a_group_is_worth_sending_and_can_be_sent_while_the_next_is_computed(tokens, rate, layers, layers_sent):
    layout = KVLayout(layers, 4, 128, "bfloat16", 2)
    found, layer = sizes(layout, tokens, rate, layers_sent), layout.slice_bytes(tokens, 1)
    worth = max(GROUP_BYTES, rate * GROUP_S)
    assert sum(found) == layers
    if layer * layers <= max(GROUP_BYTES, rate * WHOLE_S):
        assert found == [layers]
    elif len(found) > 1:
        assert all(size * layer >= worth - layer for size in found)
        assert (found[-1] - 1) * layer < worth, "nothing is computed any more while the last one is sent"
        if layers_sent > 2:
            for size, after in pairwise(found[1:]):
                assert size <= after * layers_sent


class Recorder:
    def __init__(self) -> None:
        self.said: list[tuple[object, int, range]] = []

    def ready(self, key, tokens, layers=None):
        self.said.append((key, tokens, layers))


@given(
    parts=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 2000)), min_size=1, max_size=6),
    seconds=st.floats(0, 10),
)
def test_every_layer_of_every_sequence_is_announced_once_and_in_order(parts, seconds):
    sender = Recorder()
    overlap = Overlap(QWEN, sender, lambda key: 1e9)
    chunks = [((f"r{index}", 1), before, new) for index, (before, new) in enumerate(parts)]
    in_groups = overlap.begin(chunks, seconds)
    assert in_groups == any(len(group_ends(QWEN, new, 1e9, 0.0)) > 1 for _, _, new in chunks)
    for end in range(1, QWEN.num_layers + 1):
        if in_groups:
            overlap.computed(end)
        for _, _, layers in sender.said:
            assert layers.stop <= end, "announced before it was computed"
    overlap.computed(QWEN.num_layers)  # after the batch, always
    for key, before, new in chunks:
        mine = [(tokens, layers) for name, tokens, layers in sender.said if name == key]
        assert {tokens for tokens, _ in mine} == {before + new}
        assert [layer for _, layers in mine for layer in layers] == list(range(QWEN.num_layers))


def test_kv_that_is_announced_layer_by_layer_arrives_before_the_rest_is_computed(net):
    """Two chunks of a prompt, layer by layer; what is announced is on the other side before the last layer is."""
    prefill, decode = net.prefill(limits=Limits(chunk_bytes=1024)), net.decode()
    decode.grant_all()
    key, ids = ("r", 1), list(range(200))
    layers = net.layout.num_layers
    pages = prefill.compute(ids)
    decode.receiver.expect(key, ids, net.cache_key)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    sent = 0
    for low, high in ((0, 128), (128, 200)):
        for layer in range(layers):
            prefill.sender.ready(key, high, range(layer, layer + 1))
            sent += net.layout.slice_bytes(high - low, 1)
            net.eventually(lambda: decode.receiver.snapshot().bytes_received == sent, "this layer is there")  # noqa: B023
    assert not decode.log.of(Committed, key)
    prefill.sender.commit(key, net.token(key))
    assert isinstance(prefill.log.wait(Delivered, key), Delivered)
    assert np.array_equal(prefill.kv(pages, range(200)), decode.kv(key, range(200)))
