"""Pieces of device memory, named by address: copied to other pieces, added up to a checksum, set to zero.

Owns: the kernels and their launch. Must not: know whose memory it is. A piece that is not there ends the process's use
of its GPU, so the caller must know that it is. Like triton_attention.py it is imported only where it is used.

The checksum is that of `lanewise/transfer/word_sum.py`: a sum over words, mixed with their places, so pieces may be
added up in any order and cut anywhere. **Not yet run on a GPU**: tested in Triton's interpreter, and compiled for one.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from .copies import upload

Areas = NDArray[np.uint64]
"""Addresses and lengths in bytes, one row each; whole words of 4 bytes."""

WORD = 4
BLOCK = 1024


@triton.jit
def _copy_kernel(source, target, words, BLOCK: tl.constexpr):
    """BLOCK words of one piece."""
    piece = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = at < tl.load(words + piece)
    here = tl.load(source + piece).to(tl.pointer_type(tl.uint32))
    there = tl.load(target + piece).to(tl.pointer_type(tl.uint32))
    tl.store(there + at, tl.load(here + at, mask=used), mask=used)


@triton.jit
def _sum_kernel(source, first, words, out, BLOCK: tl.constexpr):
    """Of BLOCK words of one piece; `first`: places of their pieces in the whole, in words."""
    piece, block = tl.program_id(0), tl.program_id(1)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = at < tl.load(words + piece)
    here = tl.load(source + piece).to(tl.pointer_type(tl.uint32))
    word = tl.load(here + at, mask=used, other=0).to(tl.uint64)
    x = ((at + tl.load(first + piece)).to(tl.uint64) << 32) | word
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    mixed = (x ^ (x >> 31)).to(tl.int64, bitcast=True)
    total = tl.sum(tl.where(used, mixed, 0), 0)
    tl.store(out + piece.to(tl.int64) * tl.num_programs(1) + block, total)


@triton.jit
def _zero_kernel(target, words, BLOCK: tl.constexpr):
    piece = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(target + piece).to(tl.pointer_type(tl.uint32))
    tl.store(there + at, tl.zeros([BLOCK], tl.uint32), mask=at < tl.load(words + piece))


def copy(source: Areas, target: Areas, device: torch.device) -> None:
    """The bytes of all source pieces, one after the other, into the target pieces, which have as many."""
    here, there, words = _cut(_checked(source), _checked(target))
    _copy_kernel[_grid(words)](*(upload(part, device) for part in (here, there, words)), BLOCK=BLOCK)


def checksum(source: Areas, device: torch.device) -> int:
    """Of all pieces as one; of 64 bits. Waits for the stream it runs on."""
    words = (_checked(source)[:, 1] // WORD).astype(np.int64)
    first = np.cumsum(words) - words
    out = torch.empty(_grid(words), dtype=torch.int64, device=device)
    arguments = (source[:, 0].astype(np.int64), first, words)
    _sum_kernel[_grid(words)](*(upload(part, device) for part in arguments), out, BLOCK=BLOCK)
    return int(out.sum().item()) & (1 << 64) - 1


def zero(target: Areas, device: torch.device) -> None:
    words = (_checked(target)[:, 1] // WORD).astype(np.int64)
    _zero_kernel[_grid(words)](upload(target[:, 0].astype(np.int64), device), upload(words, device), BLOCK=BLOCK)


def _checked(areas: Areas) -> Areas:
    if not len(areas) or (areas % WORD).any() or not areas.all():
        raise ValueError("pieces of no whole words")
    return areas


def _grid(words: NDArray[np.int64]) -> tuple[int, int]:
    return len(words), triton.cdiv(int(words.max()), BLOCK)


def _cut(source: Areas, target: Areas) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Addresses here and there and numbers of words, so that no piece crosses an edge of either side."""
    ends, other_ends = np.cumsum(source[:, 1]), np.cumsum(target[:, 1])
    if ends[-1] != other_ends[-1]:
        raise ValueError(f"{ends[-1]} bytes do not fill {other_ends[-1]}")
    stops = np.union1d(ends, other_ends)
    starts = np.concatenate([np.zeros(1, np.uint64), stops[:-1]])
    found = []
    for areas, stop in ((source, ends), (target, other_ends)):
        index = np.searchsorted(stop, starts, "right")
        found.append((areas[index, 0] + starts - (stop[index] - areas[index, 1])).astype(np.int64))
    return found[0], found[1], ((stops - starts) // WORD).astype(np.int64)
