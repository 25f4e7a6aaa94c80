"""The requests that wait for a worker pair, oldest first.

Owns: the bound on their number and bytes. Must not: decide how long one may wait (flight.py does) or where it goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from lanewise.errors import ErrorCode, LanewiseError
from lanewise.router.orders import Order

HELD_BYTES_PER_TOKEN = 36  # an int and its place in a tuple

E = TypeVar("E")


class Held(Generic[E]):
    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._entries: dict[str, E] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[E]:
        """Safe against changes on the way."""
        return iter(list(self._entries.values()))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def refusal(self, order: Order) -> LanewiseError | None:
        """Why an arrival cannot be held; what was accepted before is never refused."""
        if len(self._entries) < self._max_requests and self._bytes + _size(order) <= self._max_bytes:
            return None
        message = f"{len(self._entries)} requests already wait for workers; retry later"
        return LanewiseError(ErrorCode.OVERLOADED, message, retry_after_s=1.0)

    def add(self, order: Order, entry: E) -> None:
        self._entries[order.request_id] = entry
        self._bytes += _size(order)

    def remove(self, order: Order) -> None:
        if self._entries.pop(order.request_id, None) is not None:
            self._bytes -= _size(order)


def _size(order: Order) -> int:
    return len(order.prompt_ids) * HELD_BYTES_PER_TOKEN
