"""The event loop: a heap of (time, sequence, action). Equal times run in the order they were scheduled.

Owns: virtual time. Must not: know what the events are about.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Action = Callable[[Any], None]


class Loop:
    """Runs actions at virtual times; time never goes back."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Action, Any]] = []
        self._sequence = 0

    def at(self, time: float, action: Action, argument: Any = None) -> None:
        """Runs `action(argument)` at `time`, or now if that has passed."""
        self._sequence += 1
        heappush(self._heap, (max(time, self.now), self._sequence, action, argument))

    def run(self, until: float = float("inf")) -> None:
        """Until nothing is left to do, or nothing before `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action, argument = heappop(heap)
            action(argument)
