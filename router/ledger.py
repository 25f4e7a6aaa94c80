"""What one router has counted since it started: plain numbers that are read at a scrape and by `Fleet/Snapshot`.

Owns: the counters that no histogram of metrics.py holds, the two ways of prefill side by side, and the lanes.
Must not: cost anything to speak of where a request passes, or influence a decision.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lanewise.fleet import Lane, Pair
from lanewise.policy.lanes import LaneController

RECENT = 200  # requests that the means of a way stand for
LANE_TIMES = 1000  # first tokens of a lane that its percentile stands for
LEARN_EVERY = 64  # arrivals


@dataclass(slots=True)
class Way:
    """One way of prefill, remote or local: decaying means over its last requests."""

    requests: int = 0
    weight: float = 0.0
    _ttft_s: float = 0.0
    _predicted_s: float = 0.0
    _other_s: float = 0.0

    def add(self, ttft_s: float, predicted_s: float, other_s: float) -> None:
        keep = 1 - 1 / RECENT
        self.requests += 1
        self.weight = self.weight * keep + 1
        self._ttft_s = self._ttft_s * keep + ttft_s
        self._predicted_s = self._predicted_s * keep + predicted_s
        self._other_s = self._other_s * keep + other_s

    @property
    def means(self) -> tuple[float, float, float]:
        """Seconds: measured, predicted, and predicted for the same requests had they gone the other way."""
        weight = self.weight or 1.0
        return self._ttft_s / weight, self._predicted_s / weight, self._other_s / weight


@dataclass(slots=True)
class LaneTimes:
    """First tokens of one lane."""

    requests: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=LANE_TIMES))

    def add(self, ttft_s: float) -> None:
        self.requests += 1
        self.recent.append(ttft_s)

    @property
    def p99_s(self) -> float:
        ordered = sorted(self.recent)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0


class Ledger:
    def __init__(self, ttft_target_s: float, short_max_tokens: int | None = None) -> None:
        self.kv_transfers = 0  # attempts whose KV came over the KV channel
        self.resumed = 0  # attempts that continued a stream on another pair
        self.held = 0  # requests that waited for a pair at least once
        self.handovers = 0  # attempts moved because their worker drained
        self.failed = 0  # requests that ended with an error, CANCELLED aside
        self.remote, self.local = Way(), Way()
        self.lanes = {Lane.SHORT: LaneTimes(), Lane.LONG: LaneTimes()}
        self._lanes = LaneController(ttft_target_s, short_max_tokens)

    @property
    def boundary_tokens(self) -> int:
        """Uncached tokens up to which a prompt is short: fixed, or learned from the recent ones."""
        return self._lanes.boundary

    def first_token(self, pair: Pair, ttft_s: float, uncached_tokens: int, prompt_tokens: int) -> None:
        """An undisturbed request has its first token."""
        if pair.other_ttft_s is not None:
            way = self.local if pair.prefill is None else self.remote
            way.add(ttft_s, pair.predicted_ttft_s, pair.other_ttft_s)
        lane = self.lanes[self._lanes.lane_of(uncached_tokens, prompt_tokens)]
        lane.add(ttft_s)
        if (self.lanes[Lane.SHORT].requests + self.lanes[Lane.LONG].requests) % LEARN_EVERY == 0:
            self._lanes.propose(())  # without instances it only learns the boundary
