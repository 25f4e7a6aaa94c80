"""What a worker can tell of its arrivals, and whether to hold a thin batch for those that are expected any moment.

Owns: the arrival-rate estimate, how a closed loop is told from open arrivals, and the hold decision.
Must not: hold when other work could use the time.
"""

from __future__ import annotations

from collections import deque
from math import exp, inf

ECHO = 0.2  # of a usual batch: an arrival this soon after one began is an answer to the one before
FEW_SURPRISES = 0.1
SURPRISE_MEMORY = 32  # arrivals
LOOP_BATCHES, LOOP_FULL = 16, 12
MEMORY_S = 10.0  # time constant of the rate: forgets a burst in seconds, in both directions


class ArrivalRate:
    """Exponentially weighted arrivals per second. Unlike the published depth estimate it rises and falls."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._last_s = -inf

    def observe(self, now: float) -> None:
        self._rate = self.at(now) + 1 / MEMORY_S
        self._last_s = max(now, self._last_s)

    def at(self, now: float) -> float:
        """The estimate at `now`; with no arrivals it decays."""
        return self._rate * exp(-max(now - self._last_s, 0.0) / MEMORY_S) if self._rate else 0.0


class Surprises:
    """Share of recent arrivals that a batch kept waiting, of those that did not find the worker idle.

    In a closed loop every request answers the end of a batch: it comes to an idle worker or just after the next batch
    began, and no batch, however long, keeps it waiting. Open arrivals come at any time, and the size of a batch is what
    they wait for. None so far: none are expected.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self._seen = 1
        self._began_s, self._ended_s = inf, -inf

    def began(self, now: float) -> None:
        self._began_s, self._ended_s = now, inf

    def ended(self, now: float) -> None:
        self._ended_s = now

    def arrival(self, now: float, quantum_s: float) -> None:
        """A request came at `now`; it may be told of when the batch that ran then is over."""
        if not self._began_s <= now < self._ended_s:
            return
        surprise = now - self._began_s > ECHO * quantum_s
        self._seen = min(self._seen + 1, SURPRISE_MEMORY)
        self.share += (surprise - self.share) / self._seen


class Loop:
    """Whether all requests come from users who wait for their answer before they ask again.

    Then all of them are here whenever a batch ends that took longer than an answer takes to come back as a request, and
    never more: of the last LOOP_BATCHES long batches that answered somebody, LOOP_FULL and more ended with the same
    number of requests, which is the highest. Open arrivals leave another number each time. When in a batch they come
    does not tell: where the way back takes as long as a usual batch, answers come at any time.
    """

    def __init__(self) -> None:
        self._counts: deque[int] = deque(maxlen=LOOP_BATCHES)
        self._answered = -1  # since a long batch ended; -1: the last one was none

    def ended(self, long: bool) -> None:
        """A batch; `long`: as a usual one may be under load, or longer."""
        self._answered = 0 if long else -1

    def answered(self) -> None:
        """A request of the batch that ended is done."""
        if self._answered >= 0:
            self._answered += 1

    def next_begins(self, waiting: int) -> None:
        """All who came before are known now."""
        if self._answered > 0:  # one that answers nobody leaves the number as it was, whoever comes
            self._counts.append(self._answered + waiting)
        self._answered = -1

    @property
    def closed(self) -> bool:
        most = max(self._counts, default=0)
        return most > 1 and self._counts.count(most) >= LOOP_FULL


def hold_until(
    now: float, oldest_s: float, requests: int, batch_s: float, rate_per_s: float, slack_end_s: float
) -> float | None:
    """When to stop holding a thin batch, or None to run it now.

    Waiting one expected gap costs every request in the batch that gap; it saves the newcomer the rest of a batch it
    would otherwise have to wait out. `slack_end_s`: when the batch must start for all in it to be on time. The oldest
    is held for half a batch at most, so that a burst of steady arrivals cannot hold it for ever.
    """
    if rate_per_s <= 0 or requests < 1:
        return None
    gap = 1 / rate_per_s
    if gap * requests >= batch_s - gap:
        return None
    until = min(now + gap, oldest_s + batch_s / 2, slack_end_s)
    return until if until > now else None
