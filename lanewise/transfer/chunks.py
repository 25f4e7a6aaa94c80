"""Cutting a prompt's KV into chunks, and telling whether chunks make up the whole. Pure.

Owns: the geometry of chunks (rectangles of tokens and layers) and the digest of a transfer.
Must not: touch bytes of pages, states or clocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import xxhash

from lanewise.policy.blocks import KVLayout
from lanewise.transfer.records import Slice

_RECORD = struct.Struct("<8sIIII")


@dataclass(slots=True)
class _Band:
    """Neighbouring layers of which the same tokens are computed and cut."""

    lo: int
    hi: int
    cut: int
    ready: int


class Cutter:
    """Turns "KV of these layers is ready up to this token" into chunks, each (token, layer) exactly once."""

    def __init__(self, layout: KVLayout, total_tokens: int) -> None:
        self._layout = layout
        self._total = total_tokens
        self._bands = [_Band(0, layout.num_layers, 0, 0)]
        self._found: dict[int, Slice | None] = {}  # by size limit; many transfers are asked for each chunk sent

    def skip(self, have_tokens: int) -> None:
        """The receiver holds these leading tokens."""
        for band in self._bands:
            band.cut = have_tokens
        self._merge()

    def ready(self, tokens: int, layers: range) -> None:
        for band in self._of(layers.start, layers.stop):
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
        unit = self._layout.wire_unit
        for band in self._bands:
            whole = (band.ready if band.ready == self._total else band.ready // unit * unit) - band.cut
            if whole <= 0:
                continue
            tokens = min(whole, max(unit, max_bytes // self._layout.slice_bytes(unit, 1) * unit))
            layers = 1
            if tokens == whole:
                layers = min(band.hi - band.lo, max(1, max_bytes // self._layout.slice_bytes(tokens, 1)))
            return Slice(band.cut, band.cut + tokens, band.lo, band.lo + layers)
        return None

    def take(self, piece: Slice) -> None:
        for band in self._of(piece.layer_lo, piece.layer_hi):
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
            if (last.cut, last.ready) == (band.cut, band.ready):
                last.hi = band.hi
            else:
                merged.append(band)
        self._bands = merged


def digest(chunks: Iterable[tuple[bytes, Slice]]) -> bytes:
    """xxh3 of 128 bits over the ordered chunk checksums and what each chunk covers; never over the bytes again."""
    state = xxhash.xxh3_128()
    for crc, piece in chunks:
        state.update(_RECORD.pack(crc, piece.token_lo, piece.token_hi, piece.layer_lo, piece.layer_hi))
    return state.digest()


def covers(pieces: Iterable[Slice], tokens: range, num_layers: int) -> bool:
    """Whether the pieces tile tokens x layers: nothing missing, nothing twice."""
    pieces = list(pieces)
    edges = sorted({0, num_layers, *(edge for p in pieces for edge in (p.layer_lo, p.layer_hi))})
    if (edges[0], edges[-1]) != (0, num_layers):
        return False
    for low, high in pairwise(edges):  # between two edges all layers are alike
        at = tokens.start
        for piece in sorted((p for p in pieces if p.layer_lo <= low and high <= p.layer_hi), key=_first_token):
            if piece.token_lo != at:
                return False
            at = piece.token_hi
        if at != tokens.stop:
            return False
    return True


def _first_token(piece: Slice) -> int:
    return piece.token_lo
