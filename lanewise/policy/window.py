"""The waiting window: whether to hold a thin batch for requests that are expected any moment.

Owns: the arrival-rate estimate and the hold decision. Must not: hold when other work could use the time.
"""

from __future__ import annotations

from math import exp, inf

ECHO = 0.2  # of a usual batch: an arrival this soon after one began is an answer to the one before,
LONG_ECHO = 0.3  # ... or this soon after a longer one began: answers take a while to come back as requests
FEW_SURPRISES, MANY_SURPRISES = 0.1, 0.6
SURPRISE_MEMORY, ENOUGH = 32, 12  # arrivals
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

    In a closed loop every request answers the end of a batch: it comes to an idle worker or soon after the next batch
    began, and no batch, however long, keeps it waiting. Open arrivals come at any time, and the size of a batch is what
    they wait for. None so far: none are expected.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self.closed = True
        """Whether requests come in answer to batches. Each state confirms itself: small batches are over before the
        answers to the last one are back, which then look like surprises. So it changes on clear evidence only."""
        self._of_long = 0.0  # the share, of long batches judged by their own length
        self._seen = 1
        self._began_s, self._ended_s = inf, -inf
        self._batch_s = 0.0

    def began(self, now: float, batch_s: float) -> None:
        """A batch that should take so long."""
        self._began_s, self._ended_s, self._batch_s = now, inf, batch_s

    def ended(self, now: float) -> None:
        self._ended_s = now

    def arrival(self, now: float, quantum_s: float) -> None:
        """A request came at `now`; it may be told of when the batch that ran then is over."""
        if not self._began_s <= now < self._ended_s:
            return
        waited_s, usual_s = now - self._began_s, ECHO * quantum_s
        self._seen = min(self._seen + 1, SURPRISE_MEMORY)
        self.share += ((waited_s > usual_s) - self.share) / self._seen
        self._of_long += ((waited_s > max(usual_s, LONG_ECHO * self._batch_s)) - self._of_long) / self._seen
        if self._of_long < FEW_SURPRISES:
            self.closed = True
        elif self._of_long > MANY_SURPRISES and self._seen > ENOUGH:
            self.closed = False


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
