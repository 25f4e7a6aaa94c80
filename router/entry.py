"""One accepted request as the dispatcher keeps it: its flight, where its tokens go, and when what happened.

Owns: this record and what is counted of it. Must not: decide or act.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from lanewise.request import Token
from lanewise.router.flight import Flight
from lanewise.router.ledger import Ledger
from lanewise.router.metrics import RouterMetrics
from lanewise.router.orders import End
from lanewise.router.placement import Placement


class Sink(Protocol):
    def put(self, choice: int, item: Token | End) -> None: ...


@dataclass(slots=True)
class Entry:
    flight: Flight
    sink: Sink
    choice: int
    started_at: float
    first_at: float = 0.0
    last_at: float = 0.0
    timer: asyncio.TimerHandle | None = None
    timer_at: float = 0.0
    placement: Placement | None = None  # the last
    was_held: bool = False
    came_back: bool = False  # it was refused lately

    def first_token(self, now: float, metrics: RouterMetrics, ledger: Ledger) -> None:
        self.first_at = now
        ttft_s = now - self.started_at
        metrics.ttft.observe(ttft_s)
        # One that waited for workers, or was disturbed, tells nothing of the two ways of prefill.
        if self.placement is not None and self.flight.epoch == 1 and not self.was_held:
            prompt, pair = len(self.flight.order.prompt_ids), self.placement.pair
            uncached = prompt - self.placement.cached_tokens
            ledger.first_token(pair, ttft_s, uncached, prompt)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        steps = len(self.flight.output_ids) - 1
        return (self.last_at - self.first_at) / steps if steps > 0 else None
