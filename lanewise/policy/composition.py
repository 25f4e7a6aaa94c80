"""A batch in the making: what goes into it, and where it ends.

Owns: how much of a request a batch takes, and the choice of its end near the length that was planned.
Must not: order work, know a queue, or read a clock.

Everything in a batch is done at its end, and a request that is done but for a few tokens waits for a whole batch more.
So the planned length is a wish: a batch grows where that ends a request and costs the others less than it gains.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import inf, sqrt

from lanewise.policy.batching import Job
from lanewise.policy.cost import CostModel

MIN_FILLER = 64  # fewer tokens than this of a long late prompt are not worth a chunk (its context is read again)
MOST_GROWTH = 2.0  # times its planned tokens a batch may become to end requests


class Batch:
    """What one batch will compute. Work is offered in the order it shall be done; each offer may be taken in part."""

    def __init__(self, cost: CostModel, budget: int, most: int, arrivals_per_s: float, now: float) -> None:
        self.chunks: list[tuple[Hashable, int]] = []
        self.tokens = 0
        self._cost, self._budget, self._most, self._now = cost, budget, most, now
        self._arrivals_per_s = arrivals_per_s
        self._quantum_s = cost.batch(budget, 0.0, 0, 1)
        self._attention_s = 0.0
        self._least_s = inf  # the batch may last this long, or someone in it who could be on time is late
        self._taken: Hashable = None

    @property
    def full(self) -> bool:
        return self.tokens >= self._budget

    @property
    def seconds(self) -> float:
        return self._seconds_with(0, 0.0)

    @property
    def least_slack_s(self) -> float:
        return self._least_s - self.seconds

    def _seconds_with(self, tokens: int, attention: float) -> float:
        return self._cost.batch(self.tokens + tokens, self._attention_s + attention, 1, len(self.chunks) + 1)

    def take(self, job: Job, most: int) -> None:
        """Up to `most` tokens of the job, unconditionally."""
        new = min(job.remaining_tokens, most)
        self._put(job, new, self._cost.attention(new, job.context_tokens))
        self._taken = job.key

    def add_on_time(self, job: Job) -> None:
        """A request that can be on time: all of it, or what the budget leaves; never at the price of one already in."""
        if job.key == self._taken:
            return
        slack = job.ttft_deadline_s - self._now
        self._stretch(job, min(self._least_s, slack))
        room = self._budget - self.tokens
        if room <= 0:
            return
        new = min(job.remaining_tokens, room)
        finishes = new == job.remaining_tokens
        limit = min(self._least_s, slack) if finishes else self._least_s
        attention = self._cost.attention(new, job.context_tokens)
        if self.chunks and self._seconds_with(new, attention) > limit:
            if finishes:
                return  # the next batch serves it better
            new = min(new, self._fitting(job, self._least_s))
            if new <= 0:
                return
            attention = self._cost.attention(new, job.context_tokens)
        self._put(job, new, attention)
        if finishes:
            self._least_s = min(self._least_s, slack)

    def add(self, job: Job) -> None:
        """Work that is late or given up: fills what is left, within the quantum in seconds."""
        if job.key == self._taken:
            return
        self._stretch(job, self._least_s)
        new = min(job.remaining_tokens, self._budget - self.tokens)
        if self.chunks:
            new = min(new, self._fitting(job, min(self._quantum_s, self._least_s)))
        if new <= 0 or (self.chunks and new < min(job.remaining_tokens, MIN_FILLER)):
            return
        self._put(job, new, self._cost.attention(new, job.context_tokens))

    def _stretch(self, job: Job, limit_s: float) -> None:
        """Makes room for all of a request that fits in part, where that costs the others less than it gains.

        Without it the request waits for a batch more. With it those in the batch, and those who come before its end,
        wait for what is added. Nobody who can be on time gets late by it.
        """
        room = self._budget - self.tokens
        over = job.remaining_tokens - room
        if room <= 0 or over <= 0 or self._budget + over > self._most:
            return
        part_s = self._seconds_with(room, self._cost.attention(room, job.context_tokens))
        whole_s = self._seconds_with(
            job.remaining_tokens, self._cost.attention(job.remaining_tokens, job.context_tokens)
        )
        if self.chunks and whole_s > limit_s:
            return
        if (whole_s - part_s) * (len(self.chunks) + self._arrivals_per_s * part_s) < part_s:
            self._budget += over
            self._quantum_s = max(self._quantum_s, self._cost.batch(self._budget, 0.0, 0, 1))

    def _put(self, job: Job, new: int, attention: float) -> None:
        self.chunks.append((job.key, new))
        self.tokens += new
        self._attention_s += attention

    def _fitting(self, job: Job, limit_s: float) -> int:
        """Tokens of the job that keep the batch within `limit_s`: a long context makes each token dearer."""
        left = limit_s - self._seconds_with(0, 0.0)
        if left <= 0:
            return 0
        half = self._cost.attention_s
        linear = self._cost.token_s + half * job.context_tokens
        if half <= 0:
            return int(left / linear)
        return int((sqrt(linear * linear + 2 * half * left) - linear) / half)
