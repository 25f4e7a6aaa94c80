"""Row-wise Triton kernels: RMS norm with residual; head norm, rotation and KV write; KV pages to rows and back.

Owns: these kernels and their launch. Must not: know layers or the wire; like triton_attention.py it is imported only
where it is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _norm_kernel(hidden, update, weight, out, eps, size, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    """One row: hidden += update, out = norm(hidden) * weight, rounded before the weight as transformers does."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    used = columns < size
    x = tl.load(hidden + row * size + columns, mask=used, other=0.0)
    if HAS_UPDATE:
        x = x + tl.load(update + row * size + columns, mask=used, other=0.0)
        tl.store(hidden + row * size + columns, x, mask=used)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    w = tl.load(weight + columns, mask=used, other=0.0)
    tl.store(out + row * size + columns, (wide * factor).to(x.dtype) * w, mask=used)


def add_norm(hidden: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """norm(hidden + update) of [rows, size]; `hidden` takes the sum in place."""
    out = torch.empty_like(hidden)
    size = hidden.shape[1]
    _norm_kernel[(len(hidden),)](
        hidden, hidden if update is None else update, weight, out, eps, size,
        HAS_UPDATE=update is not None, BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return out


@triton.jit
def _heads_kernel(
    qkv, query, keys, values, cos, sin, slots, query_norm, key_norm, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One head of one row of [query heads | key heads | value heads]."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim: tl.constexpr = 2 * HALF
    at = tl.arange(0, BLOCK)
    used = at < HALF
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * dim + at
    left, right = tl.load(source, mask=used, other=0.0), tl.load(source + HALF, mask=used, other=0.0)
    slot = tl.load(slots + row)
    there = at < tl.where(slot >= 0, HALF, 0)  # a row that only fills up a captured batch has no slot
    if head >= HEADS + KV_HEADS:
        to = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * dim + at
        tl.store(to, left, mask=there)
        tl.store(to + HALF, right, mask=there)
    else:
        is_query = head < HEADS
        if HAS_NORM:
            wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
            squares = tl.sum(wide_left * wide_left, 0) + tl.sum(wide_right * wide_right, 0)
            factor = tl.rsqrt(squares / dim + eps)
            weight = query_norm if is_query else key_norm
            left = (wide_left * factor).to(left.dtype) * tl.load(weight + at, mask=used, other=0.0)
            right = (wide_right * factor).to(right.dtype) * tl.load(weight + HALF + at, mask=used, other=0.0)
        c = tl.load(cos + row * HALF + at, mask=used, other=0.0)
        s = tl.load(sin + row * HALF + at, mask=used, other=0.0)
        turned_left, turned_right = left * c - right * s, right * c + left * s
        if is_query:  # noqa: SIM108  the two sides are different pointers
            to = query + (row * HEADS + head) * dim + at
        else:
            to = keys + (slot * KV_HEADS + head - HEADS) * dim + at
        shown = at < tl.where(is_query, HALF, tl.where(slot >= 0, HALF, 0))
        tl.store(to, turned_left.to(left.dtype), mask=shown)
        tl.store(to + HALF, turned_right.to(left.dtype), mask=shown)


def rotate_and_write(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    query: torch.Tensor | None = None,
) -> torch.Tensor:
    """Query [rows, heads, dim], rotated; keys (rotated) and values go to `slots` of cache [2, pages, page, heads, dim].

    `qkv` is [rows, heads + 2 * kv_heads, dim], cos and sin [rows, dim / 2], `norms` the weights of query and key norm.
    The query is written to `query` where that is given.
    """
    rows, all_heads, dim = qkv.shape
    kv_heads = cache.shape[3]
    heads = all_heads - 2 * kv_heads
    if query is None:
        query = torch.empty((rows, heads, dim), dtype=qkv.dtype, device=qkv.device)
    query_norm, key_norm = norms or (cos, cos)
    _heads_kernel[rows, all_heads](
        qkv.contiguous(), query, cache[0], cache[1], cos.contiguous(), sin.contiguous(), slots, query_norm, key_norm,
        eps, HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2),
        HAS_NORM=norms is not None,
    )  # fmt: skip
    return query


@triton.jit(do_not_specialize=["count"])  # or the first call with 1, and with 16, would wait for the compiler
def _copy_kernel(pool, rows, slots, half_stride, count, size, TO_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One token's K or V between its slot of the pool and its row."""
    token, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        used = at < size
        place = pool + which * half_stride + slot * size + at
        row = rows + (which * count + token) * size + at
        if TO_ROWS:
            tl.store(row, tl.load(place, mask=used), mask=used)
        else:
            tl.store(place, tl.load(row, mask=used), mask=used)


def gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[2, slots, heads, dim]: the KV of these slots of one layer, in the order of the wire."""
    rows = torch.empty((2, len(slots), *cache.shape[3:]), dtype=cache.dtype, device=cache.device)
    _copy(cache, rows, slots, to_rows=True)
    return rows


def scatter(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """The inverse of `gather`."""
    _copy(cache, rows.contiguous(), slots, to_rows=False)


def _copy(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, *, to_rows: bool) -> None:
    size = cache.shape[3] * cache.shape[4]
    _copy_kernel[len(slots), 2](
        cache, rows, slots, cache.stride(0), len(slots), size,
        TO_ROWS=to_rows, BLOCK=min(1024, triton.next_power_of_2(size)),
    )  # fmt: skip
