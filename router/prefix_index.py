"""Which prompt prefixes one worker holds in its KV cache, as that worker reports it.

Owns: the set of unit hashes of one session, kept by one snapshot and numbered deltas.
Must not: guess. A gap in the numbers raises, and the session is opened anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from lanewise.policy.blocks import DIGEST_BYTES, UNIT_TOKENS


class BlockEventGap(Exception):
    """A numbered event is missing: the index can no longer be trusted."""


def _split(packed: bytes) -> list[bytes]:
    if len(packed) % DIGEST_BYTES:
        raise BlockEventGap(f"{len(packed)} bytes are not a whole number of {DIGEST_BYTES}-byte hashes")
    return [packed[i : i + DIGEST_BYTES] for i in range(0, len(packed), DIGEST_BYTES)]


class PrefixIndex:
    def __init__(self) -> None:
        self._units: set[bytes] = set()
        self._number: int | None = None  # of the last event applied

    def __len__(self) -> int:
        return len(self._units)

    def apply(self, number: int, snapshot: bool, added: bytes, removed: bytes) -> None:
        if snapshot:
            self._units = set(_split(added))
        else:
            if self._number is None or number != self._number + 1:
                raise BlockEventGap(f"block event {number} follows {self._number}")
            self._units.difference_update(_split(removed))
            self._units.update(_split(added))
        self._number = number

    def cached_tokens(self, units: Sequence[bytes], prompt_tokens: int) -> int:
        """Leading tokens of a prompt with these unit hashes that need no computing. At least one always does."""
        usable = min(len(units), (prompt_tokens - 1) // UNIT_TOKENS)
        for position in range(usable):
            if units[position] not in self._units:
                return position * UNIT_TOKENS
        return usable * UNIT_TOKENS
