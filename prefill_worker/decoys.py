"""The fault `misbind`: one request's transfer gets the ids and pages of another one. Does nothing unless that is armed.

Owns: finished attempts whose pages are kept back so that the lie is consistent: KV fully computed, checksums valid.
Must not: change what the sender or the engine does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from lanewise.engine.sequence import Sequence
    from lanewise.transfer.faults import Faults

Key = tuple[str, int]
MAX_KEPT = 4


class _Attempt(Protocol):
    seq: Sequence
    cache_key: bytes

    @property
    def key(self) -> Key: ...


A = TypeVar("A", bound=_Attempt)


class Decoys(Generic[A]):
    def __init__(self, faults: Faults, free: Callable[[A], None]) -> None:
        self._faults = faults
        self._free = free
        self._kept: list[A] = []
        self._used: dict[Key, A] = {}  # by the transfer that shows it

    def __bool__(self) -> bool:
        return bool(self._kept or self._used)

    def keep(self, attempt: A) -> bool:
        """Whether the pages of this finished attempt are kept back; `free` is called for it later."""
        if not self._faults.armed("misbind") or len(self._kept) >= MAX_KEPT or not attempt.seq.num_computed:
            return False
        if attempt.seq.num_uncomputed > 1:  # token 1 is an id too, and nobody computes its KV here
            return False
        self._kept.append(attempt)
        return True

    def instead_of(self, attempt: A) -> A:
        """The attempt whose ids and pages go under the name of this one."""
        for other in self._kept:
            same = other.cache_key == attempt.cache_key and other.seq.num_computed == len(attempt.seq.ids)
            if same and other.seq.ids[: other.seq.num_computed] != attempt.seq.ids:
                if not self._faults.take("misbind", "begin", attempt.key[0]):
                    return attempt
                self._kept.remove(other)
                self._used[attempt.key] = other
                return other
        return attempt

    def ended(self, key: Key) -> None:
        """The transfer of this name is over."""
        if other := self._used.pop(key, None):
            self._free(other)

    def sweep(self) -> None:
        """Nothing is kept longer than the fault is armed."""
        if self._kept and not self._faults.armed("misbind"):
            kept, self._kept = self._kept, []
            for attempt in kept:
                self._free(attempt)
