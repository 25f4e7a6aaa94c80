"""The checksum of a chunk that a GPU computes where the bytes lie, and its CPU form. Pure.

For each word of 4 bytes its place and its bits, side by side one number of 64 bits, are mixed (the finaliser of
splitmix64); the checksum is the sum of all. So threads may add up parts in any order, and a word that changes, or
changes its place, changes the sum by a number that looks drawn at random. It is against damage, not against forgers, as
xxh3 is. Must not: be used where xxh3 can be: on a CPU it makes 0.4 GB/s, not 30.
"""

from __future__ import annotations

import numpy as np

BYTES = 8
_STEP = 1 << 16  # words at once: what is in between stays in the core's cache
_MASK = (1 << 64) - 1


def word_sum(data: bytes | bytearray | memoryview) -> bytes:
    """ValueError where these are no whole words."""
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no whole words")
    words = np.frombuffer(data, "<u4")
    total = 0
    for start in range(0, len(words), _STEP):
        x = words[start : start + _STEP].astype(np.uint64)
        x |= np.arange(start, start + len(x), dtype=np.uint64) << np.uint64(32)
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        total += int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))
    return packed(total)


def packed(total: int) -> bytes:
    """A sum as it stands in a message."""
    return (total & _MASK).to_bytes(BYTES, "little")
