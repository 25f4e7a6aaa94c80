"""Which services wait to be looked at: coalescing, spaced out, with back-off.

Owns: when a key is due. A key is worked on by one worker at a time; a key that is added meanwhile is due again after.
Must not: know what a key means.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import structlog

K = TypeVar("K", bound=Hashable)

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 300.0
JITTER = 0.2

log = structlog.get_logger(__name__)


class WorkQueue(Generic[K]):
    """`spacing_s`: least time between two starts of one key; many events in a burst cost one look."""

    def __init__(self, *, spacing_s: float = 0.2, clock: Callable[[], float] = time.monotonic) -> None:
        self._spacing_s, self._clock = spacing_s, clock
        self._due: dict[K, float] = {}  # key -> earliest time
        self._heap: list[tuple[float, int, K]] = []
        self._number = 0
        self._running: set[K] = set()
        self._again: dict[K, float] = {}  # added while running
        self._started: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: K, delay_s: float = 0.0) -> None:
        """Due after `delay_s`, unless it is due earlier already."""
        now = self._clock()
        when = max(now + delay_s, self._started.get(key, now - self._spacing_s) + self._spacing_s)
        if key in self._running:
            self._again[key] = min(when, self._again.get(key, when))
            return
        if when < self._due.get(key, float("inf")):
            self._due[key] = when
            self._number += 1
            heapq.heappush(self._heap, (when, self._number, key))
            self._wake.set()

    def forget(self, key: K) -> None:
        """The key means nothing any more."""
        for table in (self._due, self._again, self._started, self._failures):
            table.pop(key, None)

    def failures(self, key: K) -> int:
        return self._failures.get(key, 0)

    async def run(self, work: Callable[[K], Awaitable[float | None]], num_workers: int) -> None:
        """`work` returns the seconds until the key is due again (None: when it is added). Errors back off."""
        async with asyncio.TaskGroup() as group:
            for _ in range(num_workers):
                group.create_task(self._worker(work))

    async def _worker(self, work: Callable[[K], Awaitable[float | None]]) -> None:
        while True:
            key = await self._next()
            again: float | None
            try:
                again = await work(key)
                self._failures.pop(key, None)
            except Exception as error:  # of one service: the others go on
                again = self._back_off(key)
                log.warning(
                    "reconcile_failed", key=key, error=f"{type(error).__name__}: {error}", retry_s=round(again, 1)
                )
            self._running.discard(key)
            added = self._again.pop(key, None)
            if added is not None:
                self.add(key, max(0.0, added - self._clock()))
            if again is not None:
                self.add(key, again)

    async def _next(self) -> K:
        while True:
            now = self._clock()
            while self._heap:
                when, _, key = self._heap[0]
                if self._due.get(key) != when:
                    heapq.heappop(self._heap)  # done, forgotten, or due earlier
                elif when <= now:
                    heapq.heappop(self._heap)
                    del self._due[key]
                    self._running.add(key)
                    self._started[key] = now
                    return key
                else:
                    break
            self._wake.clear()
            left = self._heap[0][0] - now if self._heap else None
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _back_off(self, key: K) -> float:
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        wait: float = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2**count)
        return wait * random.uniform(1 - JITTER, 1 + JITTER)
