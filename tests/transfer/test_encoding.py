"""Lossy encodings of KV: how far values move at most, and that nothing depends on how a prompt was cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.errors import ConfigError
from lanewise.policy.blocks import KVLayout
from lanewise.transfer import Aborted, Delivered
from lanewise.transfer.encoding import ENCODINGS, Encoding, NotEncodable, wire_layout

LOSSY = [name for name in ENCODINGS if name != "Native"]
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def layout(dtype: str = "float32", layers: int = 3, heads: int = 2, dim: int = 16) -> KVLayout:
    return KVLayout(layers, heads, dim, dtype, BYTES[dtype])


def coder(name: str, of: KVLayout) -> Encoding:
    return Encoding(wire_layout(of, name))


def some_kv(of: KVLayout, tokens: int, layers: int, seed: int = 0) -> np.ndarray:
    """[layer][K|V][token][head][dim] with channels of very different size, as keys have them; exact in bf16."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((layers, 2, tokens, of.num_kv_heads, of.head_dim)).astype(np.float32)
    values *= 2.0 ** draw.integers(-6, 5, (layers, 1, 1, of.num_kv_heads, of.head_dim))
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """As the pool of this type holds them, in bytes."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    return values.astype(dtype).reshape(-1).view(np.uint8)


def loaded(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return raw.view(dtype).astype(np.float32).reshape(shape)


def round_trip(encoding: Encoding, raw: np.ndarray, tokens: int, layers: int) -> np.ndarray:
    wire = np.full(encoding.layout.wire_bytes(tokens, layers), 0xAB, np.uint8)
    encoding.encode(raw, tokens, layers, wire)
    return encoding.decode(wire.data, tokens, layers)


def per_group(values: np.ndarray, what) -> np.ndarray:
    """`what(array, axis, keepdims)` over the group that each value is quantised with, beside each value."""
    out = np.empty_like(values)
    for start in range(0, values.shape[2], 64):
        out[:, 0, start : start + 64] = what(values[:, 0, start : start + 64], 1, keepdims=True)
    out[:, 1] = what(values[:, 1], -1, keepdims=True)
    return out


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("name", LOSSY)
@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 200), layers=st.integers(1, 3), seed=st.integers(0, 9))
def test_no_value_moves_by_more_than_half_a_step(name, dtype, tokens, layers, seed):
    of = layout(dtype)
    values = some_kv(of, tokens, layers, seed)
    back = loaded(round_trip(coder(name, of), stored(values, dtype), tokens, layers), dtype, values.shape)
    least, most = per_group(values, np.min), per_group(values, np.max)
    step = {"Int8": np.maximum(most, -least) / 127, "KIVI4": (most - least) / 15, "KIVI2": (most - least) / 3}[name]
    rounding = (
        np.abs(least) * 2**-11 + np.abs(back) * 2**-8 + 1e-5
    )  # of the minimum, of the storage type, of what is tiny
    assert (np.abs(back - values) <= 0.57 * step + rounding).all()  # a scale is rounded too: the ends are cut a little


@pytest.mark.parametrize("name", LOSSY)
def test_what_a_prompt_becomes_does_not_depend_on_its_cuts(name):
    of = layout()
    values = some_kv(of, 150, 3)
    whole = loaded(round_trip(coder(name, of), stored(values, "float32"), 150, 3), "float32", values.shape)
    for lo, hi, low, high in ((0, 64, 0, 3), (64, 150, 0, 1), (64, 150, 1, 3), (128, 150, 2, 3)):
        part = np.ascontiguousarray(values[low:high, :, lo:hi])
        raw = round_trip(coder(name, of), stored(part, "float32"), hi - lo, high - low)
        assert np.array_equal(loaded(raw, "float32", part.shape), whole[low:high, :, lo:hi])


def test_fewer_bytes_go_over_the_wire():
    of = layout("bfloat16", layers=28, heads=4, dim=128)
    native = of.slice_bytes(1024, 28)
    share = {name: coder(name, of).layout.wire_bytes(1024, 28) / native for name in LOSSY}
    assert share["Int8"] == pytest.approx(0.512, abs=0.001)
    assert share["KIVI4"] == pytest.approx(0.274, abs=0.001)
    assert share["KIVI2"] == pytest.approx(0.149, abs=0.001)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", LOSSY)
def test_what_cannot_be_expressed_is_refused(name, bad):
    of = layout()
    values = some_kv(of, 70, 1)
    values[0, 1, 65, 1, 3] = bad
    encoding = coder(name, of)
    with pytest.raises(NotEncodable, match="too large"):
        encoding.encode(stored(values, "float32"), 70, 1, np.empty(encoding.layout.wire_bytes(70, 1), np.uint8))


@pytest.mark.parametrize("name", LOSSY)
def test_zeros_and_the_smallest_values_survive(name):
    of = layout()
    values = np.zeros((1, 2, 65, 2, 16), np.float32)
    values[0, 0, 3, 0, 0] = 1e-30
    back = loaded(round_trip(coder(name, of), stored(values, "float32"), 65, 1), "float32", values.shape)
    assert np.abs(back).max() <= 1e-6


def test_layouts_without_an_encoding_are_named():
    assert Encoding.of(wire_layout(layout(), "Native")) is None
    with pytest.raises(ConfigError, match="KV in int8 cannot go as Int8"):
        wire_layout(KVLayout(1, 1, 16, "int8", 1), "Int8")
    with pytest.raises(ConfigError, match="heads of 6 values"):
        wire_layout(layout(dim=6), "KIVI2")
    with pytest.raises(ConfigError, match="known: Native, Int8"):
        wire_layout(layout(), "Int3")


# ---------------------------------------------------------------- through the channel

PROMPT = list(range(150))


def lossy_pair(net, name):
    of = wire_layout(replace(net.layout, head_dim=16), name)
    prefill = net.prefill(net.endpoint(layout=of), timers=net.steady, limits=net.limits(chunk_bytes=20_000))
    decode = net.decode(net.endpoint(layout=of), timers=net.steady)
    return of, prefill, decode


def offer(net, prefill, decode, key, kv):
    """Begins a transfer of this KV ([layer][K|V][token][head][dim]), computed in three steps of 50 tokens."""
    pages = prefill.store.take(len(PROMPT))
    heads = range(prefill.store.layout.num_kv_heads)
    prefill.store.write(pages, range(len(PROMPT)), range(3), heads, kv.reshape(-1).view(np.uint8).data)
    decode.receiver.expect(key, PROMPT, net.cache_key)
    prefill.sender.begin(key, decode.peer, PROMPT, net.cache_key, pages)
    for ready in (50, 100):
        prefill.sender.ready(key, ready)
    prefill.sender.commit(key, net.token(key))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("have", [0, 64])
def test_a_pool_gets_exactly_what_the_encoding_makes_of_a_prompt(net, name, have):
    of, prefill, decode = lossy_pair(net, name)
    decode.grant_all(have)
    values = some_kv(of, len(PROMPT), 3)
    offer(net, prefill, decode, ("r", 1), values)
    prefill.log.wait(Delivered, ("r", 1))
    expected = loaded(round_trip(Encoding(of), stored(values, "float32"), 150, 3), "float32", values.shape)
    got = decode.kv(("r", 1), range(have, 150)).reshape(-1).view(np.float32)
    assert np.array_equal(got, expected[:, :, have:].reshape(-1))
    sent = prefill.sender.snapshot().bytes_sent
    assert sent == of.wire_bytes(150 - have, 3) < 0.6 * of.slice_bytes(150 - have, 3)


def test_kv_that_cannot_be_expressed_ends_its_transfer_and_no_other(net):
    of, prefill, decode = lossy_pair(net, "Int8")
    decode.grant_all()
    values = some_kv(of, len(PROMPT), 3)
    broken = values.copy()
    broken[1, 0, 70, 0, 0] = np.nan
    offer(net, prefill, decode, ("bad", 1), broken)
    offer(net, prefill, decode, ("good", 1), values)
    assert "NaN" in prefill.log.wait(Aborted, ("bad", 1)).reason
    prefill.log.wait(Delivered, ("good", 1))


def test_sides_of_different_encodings_refuse_each_other_by_name(net):
    _, prefill, _ = lossy_pair(net, "Int8")
    decode = net.decode(net.endpoint(layout=replace(net.layout, head_dim=16)), timers=net.steady)
    offer(net, prefill, decode, ("r", 1), some_kv(layout(), len(PROMPT), 3))
    assert "layout.encoding: Native here, Int8 there" in prefill.log.wait(Aborted, ("r", 1)).reason
