"""Attention over paged KV as Triton kernels: decode split over the KV, ragged prompts over cached prefixes.

Owns: the two kernels, the reduction between splits, their launch. Must not: know requests, or be imported without need:
Triton decides at import whether it interprets (TRITON_INTERPRET=1) or compiles for a GPU.

Splits and KV blocks lie at absolute positions and are added in order, so a row's result does not depend on the batch.
What varies between batches is not specialised: a first table one page or 16 pages wide would wait for the compiler.
Products are "ieee": in fp32 a GPU would else keep ten bits of each factor (tf32). Shorter types are not touched by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl

from .copies import upload
from .plan import Span

SPLIT_TOKENS = 512
MIN_DOT = 16  # the smallest side tl.dot takes

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class TritonPlan(Generic[A]):
    """The batch as arrays, on the host or on the device; sequences stay in the order they came in."""

    order: list[int]
    ends: list[int]
    positions: A  # [rows]
    slots: A  # [rows], where each new token's KV goes; -1: nowhere
    table: A  # [sequences, pages] int32
    decode: A  # [decode rows, 3] int32: row, sequence, tokens
    tiles: A  # [tiles, 4] int32: first row, sequence, position of the first row, rows
    max_tokens: int  # of any decode row


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _decode_kernel(
    query, keys, values, table, decode, partial, summary, scale, window, num_splits, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One (sequence, KV head, split): unnormalised output, maximum and sum of its tokens."""
    index, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(decode + index * 3)
    sequence = tl.load(decode + index * 3 + 1)
    tokens = tl.load(decode + index * 3 + 2)
    group: tl.constexpr = HEADS // KV_HEADS
    heads = kv_head * group + tl.arange(0, ROWS)
    used = tl.arange(0, ROWS) < group
    dims = tl.arange(0, DIM)
    q = tl.load(query + (row * HEADS + heads[:, None]) * DIM + dims[None, :], mask=used[:, None], other=0.0)
    first = tl.maximum(0, tokens - window)
    low = tl.maximum(split * SPLIT, first // BLOCK * BLOCK)
    high = tl.minimum(tokens, (split + 1) * SPLIT)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(low, high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = (at < high) & (at >= first)
        page = tl.load(table + sequence * table_stride + at // PAGE, mask=at < high, other=0).to(tl.int64)
        place = ((page * PAGE + at % PAGE) * KV_HEADS + kv_head) * DIM
        k = tl.load(keys + place[:, None] + dims[None, :], mask=seen[:, None], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        best = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        factor = tl.exp(top - safe)
        weights = tl.exp(scores - safe[:, None])
        v = tl.load(values + place[:, None] + dims[None, :], mask=seen[:, None], other=0.0)
        out = out * factor[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * factor + tl.sum(weights, 1)
        top = best
    to = (index * HEADS + heads) * num_splits + split
    tl.store(partial + to[:, None] * DIM + dims[None, :], out, mask=used[:, None])
    tl.store(summary + to * 2, top, mask=used)
    tl.store(summary + to * 2 + 1, total, mask=used)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    partial, summary, decode, out, num_splits, HEADS: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr
):
    """The splits of one (sequence, head), in order."""
    index, head = tl.program_id(0), tl.program_id(1)
    row, tokens = tl.load(decode + index * 3), tl.load(decode + index * 3 + 2)
    dims = tl.arange(0, DIM)
    base = (index * HEADS + head) * num_splits
    top = float("-inf")
    total = 0.0
    result = tl.zeros([DIM], tl.float32)
    for split in range(tl.cdiv(tokens, SPLIT)):
        here = tl.load(summary + (base + split) * 2)
        best = tl.maximum(top, here)
        safe = tl.where(best == float("-inf"), 0.0, best)
        before, now = tl.exp(top - safe), tl.exp(here - safe)
        result = result * before + tl.load(partial + (base + split) * DIM + dims) * now
        total = total * before + tl.load(summary + (base + split) * 2 + 1) * now
        top = best
    # An entry without tokens only fills up a captured batch, and its row may be another's.
    there = dims < tl.where(tokens > 0, DIM, 0)
    total = tl.where(tokens > 0, total, 1.0)
    tl.store(out + (row * HEADS + head) * DIM + dims, (result / total).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["table_stride"])
def _prompt_kernel(
    query, keys, values, table, tiles, out, scale, window, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS neighbouring new tokens of one sequence for one head, over cached and new KV alike."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles + tile * 4)
    sequence = tl.load(tiles + tile * 4 + 1)
    position = tl.load(tiles + tile * 4 + 2)
    count = tl.load(tiles + tile * 4 + 3)
    kv_head = head // (HEADS // KV_HEADS)
    offsets = tl.arange(0, ROWS)
    used = offsets < count
    dims = tl.arange(0, DIM)
    places = ((row + offsets[:, None]) * HEADS + head) * DIM + dims[None, :]
    q = tl.load(query + places, mask=used[:, None], other=0.0)
    stop = position + count
    low = tl.maximum(0, position + 1 - window) // BLOCK * BLOCK
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(low, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < stop
        page = tl.load(table + sequence * table_stride + at // PAGE, mask=there, other=0).to(tl.int64)
        place = ((page * PAGE + at % PAGE) * KV_HEADS + kv_head) * DIM
        k = tl.load(keys + place[:, None] + dims[None, :], mask=there[:, None], other=0.0)
        mine = position + offsets
        seen = (at[None, :] <= mine[:, None]) & (at[None, :] > mine[:, None] - window) & there[None, :]
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        best = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        factor = tl.exp(top - safe)
        weights = tl.exp(scores - safe[:, None])
        v = tl.load(values + place[:, None] + dims[None, :], mask=there[:, None], other=0.0)
        result = result * factor[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * factor + tl.sum(weights, 1)
        top = best
    total = tl.where(used, total, 1.0)
    tl.store(out + places, (result / total[:, None]).to(out.dtype.element_ty), mask=used[:, None])


class TritonAttention:
    """The interface of `TorchAttention`; head_dim must be a power of two of at least 16."""

    def __init__(self, head_dim: int, num_kv_heads: int, page_tokens: int, dtype: torch.dtype, device: torch.device):
        if head_dim < MIN_DOT or head_dim & (head_dim - 1):
            raise ValueError(f"head size {head_dim} is no power of two of at least {MIN_DOT}")
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads
        self.page_tokens = page_tokens
        self.dtype = dtype
        self.device = device
        # Larger ones in fp32, and each thread keeps kilobytes in memory for want of registers.
        self.block_tokens, self.tile_rows = (32, 16) if dtype == torch.float32 else (64, 64)
        self.split_tokens = SPLIT_TOKENS

    def plan(self, spans: Sequence[Span]) -> TritonPlan[torch.Tensor]:
        host = self.host_plan(spans)
        arrays = (host.positions, host.slots, host.table, host.decode, host.tiles)
        positions, slots, table, decode, tiles = (upload(array, self.device) for array in arrays)
        return TritonPlan(host.order, host.ends, positions, slots, table, decode, tiles, host.max_tokens)

    def host_plan(self, spans: Sequence[Span]) -> TritonPlan[np.ndarray]:
        ends = np.cumsum([span.num_new for span in spans])
        table = np.zeros((len(spans), max(len(span.pages) for span in spans)), dtype=np.int32)
        slots, positions, decode, tiles = [], [], [], []
        for index, (span, end) in enumerate(zip(spans, ends.tolist(), strict=True)):
            pages = np.asarray(span.pages, dtype=np.int32)
            table[index, : len(pages)] = pages
            tokens = np.arange(span.num_context, span.num_tokens)
            positions.append(tokens)
            slots.append(
                pages[tokens // self.page_tokens].astype(np.int64) * self.page_tokens + tokens % self.page_tokens
            )
            first = end - span.num_new
            if span.num_new == 1:
                decode.append((first, index, span.num_tokens))
            else:
                steps = range(0, span.num_new, self.tile_rows)
                tiles += [
                    (first + at, index, span.num_context + at, min(self.tile_rows, span.num_new - at)) for at in steps
                ]
        return TritonPlan(
            order=list(range(len(spans))),
            ends=ends.tolist(),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            table=table,
            decode=np.array(decode, dtype=np.int32).reshape(-1, 3),
            tiles=np.array(tiles, dtype=np.int32).reshape(-1, 4),
            max_tokens=max((tokens for _, _, tokens in decode), default=0),
        )

    def attend(
        self,
        plan: TritonPlan[torch.Tensor],
        cache: torch.Tensor,
        query: torch.Tensor,
        window: int | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output [rows, heads, head_dim] for query [rows, heads, head_dim]; the new KV has been written already.

        It goes to `out` where that is given, in which rows that belong to no sequence stay as they are."""
        query = query.contiguous()
        if out is None:
            # Zeros: rows that only fill up a captured batch are nobody's, and what lay there may be no number.
            out = torch.zeros_like(query)
        seen = window or 1 << 30
        if len(plan.tiles):
            self._prompts(plan, cache, query, out, seen)
        if len(plan.decode):
            self._decode(plan, cache, query, out, seen)
        return out

    def _prompts(
        self, plan: TritonPlan[torch.Tensor], cache: torch.Tensor, query: torch.Tensor, out: torch.Tensor, seen: int
    ) -> None:
        heads = query.shape[1]
        _prompt_kernel[len(plan.tiles), heads](
            query, cache[0], cache[1], plan.table, plan.tiles, out, self.head_dim**-0.5, seen, plan.table.shape[1],
            HEADS=heads, KV_HEADS=self.num_kv_heads, DIM=self.head_dim, PAGE=self.page_tokens, ROWS=self.tile_rows,
            BLOCK=self.block_tokens,
        )  # fmt: skip

    def _decode(
        self, plan: TritonPlan[torch.Tensor], cache: torch.Tensor, query: torch.Tensor, out: torch.Tensor, seen: int
    ) -> None:
        heads, count = query.shape[1], len(plan.decode)
        splits = -(-plan.max_tokens // self.split_tokens)
        partial = torch.empty((count, heads, splits, self.head_dim), dtype=torch.float32, device=self.device)
        summary = torch.empty((count, heads, splits, 2), dtype=torch.float32, device=self.device)
        rows = max(MIN_DOT, triton.next_power_of_2(heads // self.num_kv_heads))
        _decode_kernel[count, self.num_kv_heads, splits](
            query, cache[0], cache[1], plan.table, plan.decode, partial, summary, self.head_dim**-0.5, seen, splits,
            plan.table.shape[1], HEADS=heads, KV_HEADS=self.num_kv_heads, DIM=self.head_dim, PAGE=self.page_tokens,
            ROWS=rows, BLOCK=self.block_tokens, SPLIT=self.split_tokens,
        )  # fmt: skip
        _combine_kernel[count, heads](
            partial, summary, plan.decode, out, splits, HEADS=heads, DIM=self.head_dim, SPLIT=self.split_tokens
        )
