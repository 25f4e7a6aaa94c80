"""Cutting a prompt's KV into chunks, and telling whether chunks make up the whole. Pure.

Owns: the geometry of chunks (boxes of tokens, layers and heads) and the digest of a transfer.
Must not: touch bytes of pages, states or clocks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

import msgspec
import xxhash

from lanewise.policy.blocks import KVLayout

_RECORD = struct.Struct("<8sIIIIII")


class Slice(msgspec.Struct, frozen=True):
    """A box of KV: these tokens of these layers of these heads. A struct, since one is made for each chunk."""

    token_lo: int
    token_hi: int
    layer_lo: int
    layer_hi: int
    head_lo: int
    head_hi: int

    @property
    def tokens(self) -> range:
        return range(self.token_lo, self.token_hi)

    @property
    def layers(self) -> range:
        return range(self.layer_lo, self.layer_hi)

    @property
    def heads(self) -> range:
        return range(self.head_lo, self.head_hi)

    @property
    def ranges(self) -> tuple[range, range, range]:
        """Tokens, layers and heads, as a `PageStore` takes them."""
        return self.tokens, self.layers, self.heads

    def overlaps(self, other: Slice) -> bool:
        apart = self.token_hi <= other.token_lo or other.token_hi <= self.token_lo
        apart |= self.layer_hi <= other.layer_lo or other.layer_hi <= self.layer_lo
        return not (apart or self.head_hi <= other.head_lo or other.head_hi <= self.head_lo)

    def nbytes(self, layout: KVLayout) -> int:
        """As a pool holds it; what credit and the size of chunks are counted in. Every head takes as much."""
        whole = layout.slice_bytes(self.token_hi - self.token_lo, self.layer_hi - self.layer_lo)
        return whole * (self.head_hi - self.head_lo) // layout.num_kv_heads

    def wire_bytes(self, layout: KVLayout) -> int:
        """Of the payload, which starts at a unit of the wire form. Every head takes as much, in every encoding."""
        whole = layout.wire_bytes(self.token_hi - self.token_lo, self.layer_hi - self.layer_lo)
        return whole * (self.head_hi - self.head_lo) // layout.num_kv_heads


@dataclass(slots=True)
class _Band:
    """Neighbouring layers of one shard of which the same tokens are computed and cut. Layers are counted through all
    shards: those of the second follow those of the first."""

    lo: int
    hi: int
    cut: int
    ready: int


class Cutter:
    """Turns "KV of these layers is ready up to this token" into chunks, each (token, layer, head) exactly once."""

    def __init__(self, layout: KVLayout, total_tokens: int, head_shards: int = 1) -> None:
        """`head_shards`: the heads lie in so many equal parts, each in a process of its own; a chunk is of one."""
        self._unit = layout.wire_unit
        self._total = total_tokens
        self._layers = layout.num_layers
        self._heads = layout.num_kv_heads // head_shards
        self._row_bytes = layout.slice_bytes(1, 1) // head_shards
        self._bands = [_Band(at, at + self._layers, 0, 0) for at in range(0, head_shards * self._layers, self._layers)]
        self._found: dict[int, Slice | None] = {}  # by size limit; many transfers are asked for each chunk sent

    def skip(self, have_tokens: int) -> None:
        """The receiver holds these leading tokens."""
        for band in self._bands:
            band.cut = have_tokens
        self._merge()

    def ready(self, tokens: int, layers: range) -> None:
        stop = min(layers.stop, self._layers)
        for first in range(0, self._bands[-1].hi, self._layers):
            for band in self._of(first + layers.start, first + stop):
                band.ready = max(band.ready, min(tokens, self._total))
        self._merge()

    @property
    def done(self) -> bool:
        return all(band.cut >= self._total for band in self._bands)

    def peek(self, max_bytes: int) -> Slice | None:
        """The next chunk of at most `max_bytes`: as many layers as fit, for a run of tokens is contiguous in a pool.

        Cuts lie between units of the wire form; a chunk has at least one, whatever that takes."""
        if max_bytes not in self._found:
            self._found[max_bytes] = self._find(max_bytes)
        return self._found[max_bytes]

    def _find(self, max_bytes: int) -> Slice | None:
        unit, row_bytes = self._unit, self._row_bytes
        for band in self._bands:
            whole = (band.ready if band.ready == self._total else band.ready // unit * unit) - band.cut
            if whole <= 0:
                continue
            tokens = min(whole, max(unit, max_bytes // (unit * row_bytes) * unit))
            layers = 1
            if tokens == whole:
                layers = min(band.hi - band.lo, max(1, max_bytes // (tokens * row_bytes)))
            shard, layer = divmod(band.lo, self._layers)
            head = shard * self._heads
            return Slice(band.cut, band.cut + tokens, layer, layer + layers, head, head + self._heads)
        return None

    def take(self, piece: Slice) -> None:
        first = piece.head_lo // self._heads * self._layers
        for band in self._of(first + piece.layer_lo, first + piece.layer_hi):
            band.cut = piece.token_hi
        self._merge()

    def _of(self, lo: int, hi: int) -> list[_Band]:
        """The bands of exactly these layers, after cutting those that reach over the edges."""
        for edge in (lo, hi):
            for index, band in enumerate(self._bands):
                if band.lo < edge < band.hi:
                    parts = [_Band(low, high, band.cut, band.ready) for low, high in ((band.lo, edge), (edge, band.hi))]
                    self._bands[index : index + 1] = parts
                    break
        return [band for band in self._bands if lo <= band.lo and band.hi <= hi]

    def _merge(self) -> None:
        self._found.clear()
        merged = self._bands[:1]
        for band in self._bands[1:]:
            last = merged[-1]
            if (last.cut, last.ready) == (band.cut, band.ready) and band.lo % self._layers:
                last.hi = band.hi
            else:
                merged.append(band)
        self._bands = merged


def digest(chunks: Iterable[tuple[bytes, Slice]]) -> bytes:
    """xxh3 of 128 bits over the ordered chunk checksums and what each chunk covers; never over the bytes again."""
    state = xxhash.xxh3_128()
    for crc, piece in chunks:
        box = (piece.token_lo, piece.token_hi, piece.layer_lo, piece.layer_hi, piece.head_lo, piece.head_hi)
        state.update(_RECORD.pack(crc, *box))
    return state.digest()


def covers(pieces: Iterable[Slice], tokens: range, layout: KVLayout) -> bool:
    """Whether the pieces tile tokens x layers x heads: nothing missing, nothing twice, nothing beside it."""
    pieces = list(pieces)
    layers, heads = layout.num_layers, layout.num_kv_heads
    if any(piece.layer_hi > layers or piece.head_hi > heads for piece in pieces):
        return False
    return all(
        _tiles(strip, tokens) for part in _strips(pieces, _heads, heads) for strip in _strips(part, _layers, layers)
    )


_Extent = Callable[[Slice], tuple[int, int]]
_heads: _Extent = attrgetter("head_lo", "head_hi")
_layers: _Extent = attrgetter("layer_lo", "layer_hi")
_first_token: Callable[[Slice], int] = attrgetter("token_lo")


def _strips(pieces: Sequence[Slice], extent: _Extent, size: int) -> Iterator[list[Slice]]:
    """The pieces over each stretch of one dimension; a stretch lies between two edges: all of it is alike."""
    spans = [(*extent(piece), piece) for piece in pieces]
    edges = sorted({0, size, *(edge for lo, hi, _ in spans for edge in (lo, hi))})
    for low, high in pairwise(edges):
        yield [piece for lo, hi, piece in spans if lo <= low and high <= hi]


def _tiles(strip: list[Slice], tokens: range) -> bool:
    at = tokens.start
    for piece in sorted(strip, key=_first_token):
        if piece.token_lo != at:
            return False
        at = piece.token_hi
    return at == tokens.stop
