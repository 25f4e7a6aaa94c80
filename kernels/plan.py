"""What one forward pass will read and write of the paged KV, worked out once and used by every layer.

Owns: the order of the sequences in the batch, KV slots of new tokens, page tables, tiles and masks.
Must not: touch KV or queries (attention.py does), or know requests, sampling or page bookkeeping.

The batch is ragged: the new tokens of all sequences lie one after the other. Sequences with one new token come first,
shortest context first, so that a tile of them is a slice of rows and pads little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .copies import upload


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of a batch: `num_new` tokens after `num_context` whose KV is in `pages` already."""

    pages: Sequence[int]
    num_context: int
    num_new: int

    @property
    def num_tokens(self) -> int:
        return self.num_context + self.num_new


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Sequences with one new token each whose KV is gathered together, padded to the longest of them."""

    rows: slice
    table: torch.Tensor  # [sequences * pages] page numbers, padded with page 0
    num_sequences: int
    num_slots: int  # tokens per sequence that are read, padding included
    mask: torch.Tensor | None  # [sequences, 1, 1, slots], 0 or -inf; None: all slots are visible to all


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence with several new tokens."""

    rows: slice
    table: torch.Tensor | None  # [pages] to gather; None: no context, the new tokens' own keys are all there is
    num_slots: int  # tokens that are read from these pages
    mask: torch.Tensor | None  # [new, slots], 0 or -inf; None: plain causal


@dataclass(frozen=True, slots=True)
class View:
    """The batch as the layers with one window see it."""

    tiles: list[DecodeTile]
    prefills: list[PrefillSpan]


class BatchPlan:
    """`order[i]` is the index in `spans` of the i-th sequence of the batch; all rows follow that order."""

    def __init__(
        self,
        spans: Sequence[Span],
        page_tokens: int,
        tile_tokens: int,
        tile_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.order = sorted(range(len(spans)), key=lambda i: (spans[i].num_new > 1, spans[i].num_context))
        self.spans = [spans[i] for i in self.order]
        self.num_decode = sum(span.num_new == 1 for span in self.spans)
        ends = np.cumsum([span.num_new for span in self.spans])
        self.ends: list[int] = ends.tolist()
        self.num_rows = self.ends[-1]
        self._page_tokens = page_tokens
        self._tile_tokens = tile_tokens
        self._tile_dtype = tile_dtype
        self._dtype = dtype
        self._device = device
        self._pages = [np.asarray(span.pages, dtype=np.int64) for span in self.spans]
        self._views: dict[int | None, View] = {}
        positions = np.concatenate([np.arange(span.num_context, span.num_tokens) for span in self.spans])
        self.positions = upload(positions, device)
        self.slots = upload(self._new_slots(), device)

    def view(self, window: int | None) -> View:
        """Tiles and masks for layers that see the last `window` tokens (None: all)."""
        if window not in self._views:
            self._views[window] = View(self._tiles(window), self._prefills(window))
        return self._views[window]

    def _new_slots(self) -> np.ndarray:
        """Where the KV of each new token goes, in a pool seen as one row of token slots."""
        parts = []
        for span, pages in zip(self.spans, self._pages, strict=True):
            tokens = np.arange(span.num_context, span.num_tokens)
            page, offset = np.divmod(tokens, self._page_tokens)
            parts.append(pages[page] * self._page_tokens + offset)
        return np.concatenate(parts)

    def _reach(self, index: int, window: int | None) -> tuple[int, int, int]:
        """(first page read, past the last page read, first token visible to the first new token)."""
        span = self.spans[index]
        first = 0 if window is None else max(0, span.num_context + 1 - window)
        return first // self._page_tokens, -(-span.num_tokens // self._page_tokens), first

    def _tiles(self, window: int | None) -> list[DecodeTile]:
        reach = [self._reach(index, window) for index in range(self.num_decode)]
        tiles: list[DecodeTile] = []
        start = longest = 0
        for index, (low, high, _) in enumerate(reach):
            grown = max(longest, high - low)
            if index > start and (index + 1 - start) * grown * self._page_tokens > self._tile_tokens:
                tiles.append(self._tile(start, index, reach, longest))
                start, grown = index, high - low
            longest = grown
        if self.num_decode:
            tiles.append(self._tile(start, self.num_decode, reach, longest))
        return tiles

    def _tile(self, start: int, stop: int, reach: list[tuple[int, int, int]], num_pages: int) -> DecodeTile:
        table = np.zeros((stop - start, num_pages), dtype=np.int64)
        lows = np.empty((stop - start, 1), dtype=np.int64)
        highs = np.empty((stop - start, 1), dtype=np.int64)
        for row, index in enumerate(range(start, stop)):
            low, high, first = reach[index]
            table[row, : high - low] = self._pages[index][low:high]
            lows[row] = first - low * self._page_tokens
            highs[row] = self.spans[index].num_tokens - low * self._page_tokens
        num_slots = int(highs.max())
        mask = None
        if lows.any() or (highs != num_slots).any():
            slot = np.arange(num_slots)
            visible = (slot >= lows) & (slot < highs)
            mask = self._additive(visible, self._tile_dtype)[:, None, None, :]
        flat = upload(table.reshape(-1), self._device)
        return DecodeTile(slice(start, stop), flat, stop - start, num_slots, mask)

    def _prefills(self, window: int | None) -> list[PrefillSpan]:
        return [self._prefill(index, window) for index in range(self.num_decode, len(self.spans))]

    def _prefill(self, index: int, window: int | None) -> PrefillSpan:
        span = self.spans[index]
        rows = slice(self.ends[index] - span.num_new, self.ends[index])
        if span.num_context == 0:
            if window is None or span.num_new <= window:
                return PrefillSpan(rows, None, span.num_new, None)
            return PrefillSpan(rows, None, span.num_new, self._causal(span, 0, window))
        low, high, _ = self._reach(index, window)
        table = upload(self._pages[index][low:high].copy(), self._device)
        base = low * self._page_tokens
        return PrefillSpan(rows, table, span.num_tokens - base, self._causal(span, base, window))

    def _causal(self, span: Span, base: int, window: int | None) -> torch.Tensor:
        """[new, slots] mask of a span whose first slot is the token at position `base`."""
        query = np.arange(span.num_context, span.num_tokens)[:, None]
        key = np.arange(base, span.num_tokens)[None, :]
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        return self._additive(visible, self._dtype)

    def _additive(self, visible: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return upload(np.where(visible, np.float32(0), np.float32("-inf")), self._device).to(dtype)
