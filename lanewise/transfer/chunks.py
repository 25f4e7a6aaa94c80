"""Cutting a prompt's KV into chunks, and telling whether chunks make up the whole. Pure.

Owns: the geometry of chunks (rectangles of tokens and layers) and the digest of a transfer.
Must not: touch bytes of pages, states or clocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import xxhash

from lanewise.policy.blocks import KVLayout
from lanewise.transfer.records import Slice

_RECORD = struct.Struct("<8sIIII")


class Cutter:
    """Turns "KV of these layers is ready up to this token" into chunks, each (token, layer) exactly once."""

    def __init__(self, layout: KVLayout, total_tokens: int) -> None:
        self._layout = layout
        self._total = total_tokens
        self._ready = [0] * layout.num_layers  # tokens computed, per layer
        self._cut = [0] * layout.num_layers  # tokens already in a chunk, per layer
        self._found: dict[int, Slice | None] = {}  # by size limit; many transfers are asked for each chunk sent

    def skip(self, have_tokens: int) -> None:
        """The receiver holds these leading tokens."""
        self._cut = [have_tokens] * len(self._cut)
        self._found.clear()

    def ready(self, tokens: int, layers: range) -> None:
        tokens = min(tokens, self._total)
        self._found.clear()
        for layer in layers:
            if 0 <= layer < len(self._ready):
                self._ready[layer] = max(self._ready[layer], tokens)

    @property
    def done(self) -> bool:
        return all(cut >= self._total for cut in self._cut)

    def peek(self, max_bytes: int) -> Slice | None:
        """The next chunk of at most `max_bytes`: as many layers as fit, for a run of tokens is contiguous in a pool."""
        if max_bytes not in self._found:
            self._found[max_bytes] = self._find(max_bytes)
        return self._found[max_bytes]

    def _find(self, max_bytes: int) -> Slice | None:
        cut, ready = self._cut, self._ready
        for first in range(len(cut)):
            lo, hi = cut[first], ready[first]
            if lo >= hi:
                continue
            tokens = min(hi - lo, max(1, max_bytes // self._layout.slice_bytes(1, 1)))
            layers = 1
            if tokens == hi - lo:
                limit = max(1, max_bytes // self._layout.slice_bytes(tokens, 1))
                while layers < limit and first + layers < len(cut):
                    if (cut[first + layers], ready[first + layers]) != (lo, hi):
                        break
                    layers += 1
            return Slice(lo, lo + tokens, first, first + layers)
        return None

    def take(self, piece: Slice) -> None:
        self._found.clear()
        for layer in piece.layers:
            self._cut[layer] = piece.token_hi


def digest(chunks: Iterable[tuple[bytes, Slice]]) -> bytes:
    """xxh3 of 128 bits over the ordered chunk checksums and what each chunk covers; never over the bytes again."""
    state = xxhash.xxh3_128()
    for crc, piece in chunks:
        state.update(_RECORD.pack(crc, piece.token_lo, piece.token_hi, piece.layer_lo, piece.layer_hi))
    return state.digest()


def covers(pieces: Iterable[Slice], tokens: range, num_layers: int) -> bool:
    """Whether the pieces tile tokens x layers: nothing missing, nothing twice."""
    spans: list[list[tuple[int, int]]] = [[] for _ in range(num_layers)]
    for piece in pieces:
        for layer in piece.layers:
            spans[layer].append((piece.token_lo, piece.token_hi))
    for row in spans:
        at = tokens.start
        for lo, hi in sorted(row):
            if lo != at:
                return False
            at = hi
        if at != tokens.stop:
            return False
    return True
