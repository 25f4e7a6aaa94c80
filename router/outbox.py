"""What one client has not taken yet: tokens and endings of all its choices, in order.

Owns: the buffer between workers and a client, and noticing that a client takes nothing.
Must not: block the side that fills it. It is bounded by the choices' max_tokens, which bound what is ever put in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lanewise.request import Token
from lanewise.router.orders import End

Item = tuple[int, Token | End]
"""The choice, and what happened to it."""


class Outbox:
    def __init__(self, stall_s: float, on_stall: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._oldest_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, choice: int, item: Token | End) -> None:
        if not self._items:
            self._oldest_at = self._loop.time()
            if self._timer is None:  # one timer per stall period, not per token
                self._timer = self._loop.call_later(self._stall_s, self._check)
        self._items.append((choice, item))
        if self._waiter is not None:
            _wake(self._waiter)

    async def take(self, timeout_s: float | None = None) -> list[Item]:
        """Everything there is; waits for the first. Empty when nothing came in time. One taker at a time."""
        if not self._items:
            self._waiter = waiter = self._loop.create_future()
            # A bare timer: asyncio.timeout would be the dearest thing that happens to a token.
            timer = None if timeout_s is None else self._loop.call_later(timeout_s, _wake, waiter)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        items, self._items = self._items, []
        return items

    def close(self) -> None:
        """The client is done, or gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._on_stall = _nothing

    def _check(self) -> None:
        self._timer = None
        if not self._items:
            return
        left = self._oldest_at + self._stall_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
        else:
            self._on_stall()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _nothing() -> None:
    pass
