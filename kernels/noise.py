"""Gumbel noise that is a pure function of (seed, absolute position, vocabulary entry).

Owns: the counter-based hash and its mapping to noise, the same on every device.
Must not: keep a generator or any state: a token sampled alone, in a batch, or again after a worker was lost gets the
same noise, bit for bit on one kind of device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .copies import upload

MASK_64 = (1 << 64) - 1


BLOCK_ENTRIES = 1 << 16
"""Entries that a CPU hashes together: the twenty passes over them should stay in a core's cache."""


def gumbel(seeds: Sequence[int], positions: Sequence[int], entries: torch.Tensor) -> torch.Tensor:
    """[len(seeds), len(entries)] of standard Gumbel noise in fp32 for the vocabulary `entries`, on their device.

    Each row has a 64-bit key from splitmix64 of its seed and position; each entry is two rounds of a 32-bit mixer over
    (entry, key). 31 bits are kept; noise never exceeds 22, which an unbiased draw does once in 4e9.
    """
    rows = max(1, BLOCK_ENTRIES // max(1, len(entries))) if entries.device.type == "cpu" else len(seeds)
    blocks = [
        _block(seeds[start : start + rows], positions[start : start + rows], entries.int())
        for start in range(0, len(seeds), rows)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _block(seeds: Sequence[int], positions: Sequence[int], entries: torch.Tensor) -> torch.Tensor:
    keys = [_row_key(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    halves = np.array(keys, dtype="<u8").view("<i4").reshape(-1, 2, 1)
    low, high = upload(halves, entries.device).unbind(1)
    bits = _mix(_mix(entries * _signed(0x9E3779B9) + low) + high)
    # Small uniforms give the large noise that decides, so that end must be the precise one: E = -log(1 - u).
    uniform = (bits.bitwise_and_(0x7FFFFFFF).float() + 0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits with low bias (xor-shift-multiply); int32 arithmetic wraps, shifts are made logical."""
    bits = bits.bitwise_xor((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _row_key(seed: int, position: int) -> int:
    return _splitmix64(_splitmix64(seed & MASK_64) ^ position)


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word
