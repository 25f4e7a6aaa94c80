"""How long the next batch lasts: a few shares of the TTFT target, moved by who waits at the border.

Owns: batch lengths in seconds and their sizes in tokens. Must not: order work, read a clock or know a queue's inside.

A batch ends for all in it at once, so its length is paid by everyone in it and by everyone who comes meanwhile; what it
buys is fewer readings of the weights. Four things move it away from one fixed length:

* late work has piled up: longer, since capacity is what the late wait for;
* more short requests than usual wait at this border: shorter, and longer when fewer do;
* someone who is to be on time has almost no slack left: longer, since a long batch wastes less and is not overtaken;
* requests come only in answer to batches (closed loops): longer, since no newcomer can be blocked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from lanewise.policy.cost import CostModel
from lanewise.policy.feasible import Due
from lanewise.policy.window import FEW_SURPRISES

QUANTUM = 0.12  # of the TTFT target one batch may last: a newcomer loses at most this much to the batch before it
BUSY_QUANTUM = 0.21  # the same once late work has piled up: larger batches waste less, and those who wait profit
ECHO_QUANTUM = 0.31  # the same when requests come only in answer to batches (closed loops): nobody to be blocked,
ECHO_WORK = 10.0  # ... but not longer than this many times what a batch takes anyway: the rest saves next to nothing,
# and those who are answered early ask again meanwhile, so that router and network work beside the next batch;
ECHO_ALL = 8  # with no more requests than this everything goes into one batch
PILE = 6.0  # targets' worth of late work at which the quantum has grown to BUSY_QUANTUM
MIN_KNEES = 1.5  # a batch is never planned smaller than this many knees: below, weight reads eat the time saved
CROWD = 0.65  # how far a batch follows the number of short requests that wait for it, against the usual number
CROWD_LEAST, CROWD_MOST = 0.4, 1.8
SHORT = 0.3  # of a batch: requests with less work than this are here to be done in one
CORNERED = 0.05  # of the target: slack below which a batch grows for the one who is to be on time ...
CORNERED_GROWTH = 1.5  # ... up to this many quanta


@dataclass(frozen=True, slots=True)
class Waiting:
    """Who waits at a batch border."""

    on_time: Sequence[Due]  # those who can still be on time together, by deadline
    late_s: float  # seconds of late work
    requests: int  # all of them
    arrivals_per_s: float
    surprises: float  # share of the arrivals that came at any time, rather than in answer to a batch
    closed: bool  # a closed loop: nobody else will come


class Sizes:
    """Batch sizes in tokens for one cost model, target and ceiling."""

    def __init__(self, cost: CostModel, target_s: float, max_batch_tokens: int) -> None:
        self._cost, self._target_s, self._most = cost, target_s, max_batch_tokens
        self._least = MIN_KNEES * cost.knee_tokens
        self._small = self._tokens_in(QUANTUM * target_s)
        self.large = max(self._tokens_in(BUSY_QUANTUM * target_s), self._small)
        self._echo = self._tokens_in(min(ECHO_QUANTUM * target_s, (1 + ECHO_WORK) * (cost.weights_s + cost.launch_s)))
        self.token_s = cost.batch(self.large, 0.0, 0, 1) / self.large  # of a full batch
        self.least_batch_s = cost.batch(1, 0.0, 1, 1)

    def still_fit(self, cost: CostModel, target_s: float, max_batch_tokens: int) -> bool:
        """Whether they were made for this model and ceiling, and a target no more than 5 % away."""
        same = self._cost is cost and self._most == max_batch_tokens
        return same and abs(self._target_s / target_s - 1) < 0.05

    def _tokens_in(self, seconds: float) -> int:
        return max(min(int(max(self._cost.tokens_in(seconds), self._least)), self._most), 1)

    def budget(self, waiting: Waiting, now: float) -> int:
        """New tokens of the next batch."""
        echoes = waiting.surprises < FEW_SURPRISES
        if (echoes or waiting.closed) and waiting.requests <= ECHO_ALL:
            return self._most
        if echoes:
            return self._echo
        pile = min(waiting.late_s / (PILE * self._target_s), 1.0)
        base = self._small + int((self.large - self._small) * pile)
        return min(max(self._for_crowd(base, waiting), self._for_cornered(waiting.on_time, now)), self._most)

    def _for_crowd(self, base: int, waiting: Waiting) -> int:
        """The shorter, the more short requests wait; but all of them fit where they fitted before.

        With a price on time and arrivals at a steady rate the best length makes those who wait now and those who come
        meanwhile together a constant number. Part of that is followed: the price is not known, and those who come in
        answer to a batch wait for none.
        """
        seconds = self._cost.batch(base, 0.0, 0, 1)
        short = [due.seconds for due in waiting.on_time if due.seconds < SHORT * seconds]
        usual = waiting.arrivals_per_s * seconds
        factor = 1.0 - CROWD * waiting.surprises * ((len(short) + 1) / (usual + 1) - 1.0)
        size = self._tokens_in(min(max(factor, CROWD_LEAST), CROWD_MOST) * seconds)
        return max(size, int(min(float(base), sum(short) / self.token_s)))

    def _for_cornered(self, on_time: Sequence[Due], now: float) -> int:
        """Grows as the least slack among those who can be on time falls below `CORNERED`; 0: nobody is cornered."""
        at, slack = now + self.least_batch_s, inf
        for due in on_time:
            at += due.seconds
            slack = min(slack, due.deadline_s - at)
        need = 1.0 - max(slack, 0.0) / (CORNERED * self._target_s)
        return int(self._small * (1.0 + (CORNERED_GROWTH - 1.0) * need)) if need > 0 else 0
