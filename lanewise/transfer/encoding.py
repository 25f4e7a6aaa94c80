"""Lossy forms of KV on the wire: fewer bytes for a slow network, at a measured cost in quality (docs/kv-channel.md).

Owns: what the bytes of a chunk mean in each encoding, and their size. Pure: arrays in, arrays out.
Must not: know transfers, pools or sockets. Credit and the limits of chunks count native bytes everywhere; only the
payload of a chunk and its checksum are of the encoded form. Sizes are `Slice.wire_bytes`.

Keys have channels that are large for every token, values have not (KIVI, arXiv 2402.02750): keys are quantised per
channel over units of 64 tokens, values per token and head. A chunk holds whole units, but for the prompt's last, so
what a prompt becomes does not depend on how it was cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lanewise.errors import ConfigError
from lanewise.policy.blocks import UNIT_TOKENS, WIRE_BITS, KVLayout

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

ENCODINGS = ("Native", *WIRE_BITS)
"""Int8: symmetric. KIVI4 and KIVI2, experimental: 4 and 2 bits with a minimum beside each scale."""


class NotEncodable(ValueError):
    """KV with a NaN, an infinity or a magnitude that a scale in fp16 cannot express."""


def wire_layout(layout: KVLayout, encoding: str) -> KVLayout:
    """The layout of a pool, to go by this encoding. Raises ConfigError for what has no such encoding."""
    if encoding == "Native":
        return layout
    if encoding not in WIRE_BITS:
        raise ConfigError(f"no KV encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    if layout.dtype not in _READ:
        raise ConfigError(f"KV in {layout.dtype} cannot go as {encoding}; expected {', '.join(_READ)}")
    if layout.head_dim % (8 // WIRE_BITS[encoding]):
        raise ConfigError(f"KV heads of {layout.head_dim} values do not fill bytes as {encoding}")
    return replace(layout, encoding=encoding)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The lossy encoding that a layout names. For each layer: keys (scales, minima, values), then values alike."""

    layout: KVLayout

    @classmethod
    def of(cls, layout: KVLayout) -> Encoding | None:
        """None: native, nothing is to be done."""
        return None if layout.encoding == "Native" else cls(layout)

    @property
    def bits(self) -> int:
        return WIRE_BITS[self.layout.encoding]

    def encode(self, native: Bytes, tokens: int, layers: int, out: Bytes) -> None:
        """`native`: wire order `[layer][K|V][token][head][dim]`, of any number of heads: nothing is shared between
        heads. `out`: of `Slice.wire_bytes`. Raises NotEncodable."""
        source = native.reshape(layers, 2, -1)
        target = out.reshape(layers, -1)
        for layer in range(layers):
            at = _Cursor(target[layer])
            for which in (0, 1):
                wide = _READ[self.layout.dtype](source[layer, which]).reshape(tokens, -1, self.layout.head_dim)
                for group in _groups(wide, which):
                    self._encode_group(group, 1 if which == 0 else 3, at)

    @np.errstate(invalid="ignore", over="ignore")
    def decode(self, data: memoryview, tokens: int, layers: int) -> Bytes:
        """The inverse, as far as it goes: native bytes. `data` must have `Slice.wire_bytes`; of how many heads it is
        follows from that."""
        heads = len(data) * self.layout.num_kv_heads // self.layout.wire_bytes(tokens, layers)
        shape = tokens, heads, self.layout.head_dim
        source = np.frombuffer(data, np.uint8).reshape(layers, -1)
        target: Bytes = np.empty((layers, 2, math.prod(shape) * self.layout.dtype_bytes), np.uint8)
        for layer in range(layers):
            at = _Cursor(source[layer])
            for which in (0, 1):
                wide: Floats = np.empty(shape, np.float32)
                for group in _groups(wide, which):
                    self._decode_group(group, 1 if which == 0 else 3, at)
                _WRITE[self.layout.dtype](wide.reshape(-1), target[layer, which])
        return target.reshape(-1)

    def _encode_group(self, group: Floats, axis: int, at: _Cursor) -> None:
        """`group`: [unit][token][head][dim]; one scale for all along `axis`."""
        if self.bits == 8:
            low = None
            scale = _half(np.maximum(group.max(axis, keepdims=True), -group.min(axis, keepdims=True)) / 127)
            shifted = group
        else:
            least = group.min(axis, keepdims=True)
            low = _half(least)
            scale = _half((group.max(axis, keepdims=True) - low) / (2**self.bits - 1))
            shifted = group - low
        at.put(scale.astype(np.float16))
        if low is not None:
            at.put(low.astype(np.float16))
        steps = np.rint(shifted / np.where(scale, scale, 1))
        if self.bits == 8:
            at.put(np.clip(steps, -127, 127).astype(np.int8))
        else:
            at.put(_pack(np.clip(steps, 0, 2**self.bits - 1).astype(np.uint8), self.bits))

    def _decode_group(self, group: Floats, axis: int, at: _Cursor) -> None:
        shape = tuple(1 if i == axis else n for i, n in enumerate(group.shape))
        scale = at.take(shape, np.float16).astype(np.float32)
        if self.bits == 8:
            np.multiply(at.take(group.shape, np.int8), scale, out=group)
            return
        low = at.take(shape, np.float16).astype(np.float32)
        packed = (*group.shape[:-1], group.shape[-1] * self.bits // 8)
        np.multiply(_unpack(at.take(packed, np.uint8), self.bits), scale, out=group)
        group += low


def _groups(wide: Floats, which: int) -> Iterator[Floats]:
    """Views [unit][token][head][dim] of [token][head][dim]: keys in whole units and the rest, values all at once."""
    tokens = len(wide)
    full = 0 if which else tokens - tokens % UNIT_TOKENS
    if full:
        yield wide[:full].reshape(-1, UNIT_TOKENS, *wide.shape[1:])
    if full < tokens:
        yield wide[full:].reshape(1, -1, *wide.shape[1:])


class _Cursor:
    """Goes through the bytes of one layer."""

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        self._at = 0

    def put(self, values: NDArray[Any]) -> None:
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._memory[self._at : self._at + flat.nbytes] = flat
        self._at += flat.nbytes

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        part = self._memory[self._at : self._at + size]
        self._at += size
        return np.frombuffer(part.tobytes(), dtype).reshape(shape)


def _half(values: Floats) -> Floats:
    """As fp16 will hold them, in fp32."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise NotEncodable("KV with a NaN, an infinity or a value too large for a scale in fp16")
    return rounded.astype(np.float32)


def _pack(values: Bytes, bits: int) -> Bytes:
    """Values of few bits, the first in the lowest bits of a byte."""
    per = 8 // bits
    lanes = values.reshape(*values.shape[:-1], -1, per)
    packed = lanes[..., 0].copy()
    for index in range(1, per):
        packed |= lanes[..., index] << (bits * index)
    return packed


def _unpack(packed: Bytes, bits: int) -> Bytes:
    per, mask = 8 // bits, 2**bits - 1
    lanes = np.stack([(packed >> (bits * index)) & mask for index in range(per)], axis=-1)
    return lanes.reshape(*packed.shape[:-1], -1)


def _read_bfloat16(raw: Bytes) -> Floats:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _write_bfloat16(wide: Floats, out: Bytes) -> None:
    bits = wide.view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even; nothing here is NaN
    out.view(np.uint16)[:] = (rounded >> 16).astype(np.uint16)


def _write_float32(wide: Floats, out: Bytes) -> None:
    out.view(np.float32)[:] = wide


def _write_float16(wide: Floats, out: Bytes) -> None:
    np.clip(wide, -65504, 65504, out=wide)  # a step beyond the largest value of a group would be an infinity
    out.view(np.float16)[:] = wide


_READ = {
    "float32": lambda raw: raw.view(np.float32),
    "float16": lambda raw: raw.view(np.float16).astype(np.float32),
    "bfloat16": _read_bfloat16,
}
_WRITE = {"float32": _write_float32, "float16": _write_float16, "bfloat16": _write_bfloat16}
