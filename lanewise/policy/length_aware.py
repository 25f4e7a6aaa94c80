"""The length-aware batching policy: who can be on time goes first, least work first; the late follow, none starves.

Owns: the order of computation in a prefill worker and the size of its batches.
Must not: read a clock, or tune itself to anything but the cost model, the targets and the queue it sees.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from heapq import merge
from math import exp, inf, log

from lanewise.policy.batching import BatchPlan, BatchPolicy, Job
from lanewise.policy.composition import MOST_GROWTH, Batch
from lanewise.policy.cost import CostModel
from lanewise.policy.feasible import Due, keep_most, shortest_safe_first
from lanewise.policy.sizing import QUANTUM, Sizes, Waiting
from lanewise.policy.window import ArrivalRate, Loop, Surprises, hold_until

DEFAULT_TARGET_S = 0.4
CAUTION = 1.5  # a request is overtaken only while its slack is this many times the work that overtakes it
URGENCY = 25.0  # work of one who would be late without it is worth this many times as much, and e times less for each
URGENT = 0.25  # of the target that is left as slack
SENIORITY = 5.0  # targets: a late request with e times the work of another ranks as if it had come this much later
OLD_TARGETS = 7.0  # a late request is old after this many targets ...
OLD_PILES = 4.0  # ... and this many times the late work that waits: an old one among little work is due a share,
OLD_SHARE = 0.3  # of every batch; old ones among much work are served in turn anyway
LONG = 0.5  # of a usual batch under load: an answer to the one before is back as a request by then
TINY_S = 1e-9


@dataclass(frozen=True, slots=True)
class _Late:
    job: Job
    seconds: float


class LengthAware(BatchPolicy):
    """Moore–Hodgson among those who can be on time, bounded batches, the late by arrival with a bonus for short."""

    def __init__(self, *, max_batch_tokens: int, cost: CostModel) -> None:
        super().__init__(max_batch_tokens=max_batch_tokens, cost=cost)
        self._hopeful: dict[Hashable, Due] = {}
        self._late: dict[Hashable, tuple[float, int]] = {}  # key -> its entry in the queue below
        self._late_queue: list[tuple[float, int, _Late]] = []
        self._late_seconds = 0.0
        self._count = 0
        self._rate = ArrivalRate()
        self._surprises = Surprises()
        self._loop = Loop()
        self._target_s = DEFAULT_TARGET_S
        self._sizes = Sizes(cost, self._target_s, max_batch_tokens)

    # -- the queue

    def add(self, job: Job) -> None:
        if job.key not in self.jobs:  # a worker adds a job again when it knows its cache hit: that is no arrival
            self._rate.observe(job.arrival_s)
            self._surprises.arrival(job.arrival_s, QUANTUM * self._target_s)
            target = job.ttft_deadline_s - job.arrival_s
            if 0 < target < inf:
                self._target_s += 0.1 * (target - self._target_s)
        super().add(job)

    def observe(self, plan: BatchPlan, now: float, duration_s: float) -> None:
        self._surprises.ended(now)
        self._loop.ended(duration_s > LONG * QUANTUM * self._target_s)

    def progress(self, key: Hashable, tokens: int) -> None:
        before = len(self.jobs)
        super().progress(key, tokens)
        if len(self.jobs) < before:
            self._loop.answered()

    def _enqueue(self, job: Job) -> None:
        self._hopeful[job.key] = Due(job.key, self._seconds(job), job.ttft_deadline_s, job.arrival_s)

    def _dequeue(self, job: Job) -> None:
        if self._hopeful.pop(job.key, None) is None:
            self._leave_late(job.key)

    def _requeue(self, before: Job, after: Job) -> None:
        if self._leave_late(before.key):
            self._become_late(after)
        else:
            self._enqueue(after)

    def _become_late(self, job: Job) -> None:
        seconds = self._seconds(job)
        self._count += 1
        rank = job.arrival_s + SENIORITY * self._target_s * log(max(seconds, TINY_S) / self._target_s)
        self._late[job.key] = (rank, self._count)
        insort(self._late_queue, (rank, self._count, _Late(job, seconds)))
        self._late_seconds += seconds

    def _leave_late(self, key: Hashable) -> bool:
        entry = self._late.pop(key, None)
        if entry is None:
            return False
        item = self._late_queue.pop(bisect_left(self._late_queue, entry))
        self._late_seconds = self._late_seconds - item[2].seconds if self._late else 0.0
        return True

    # -- times and sizes

    def _seconds(self, job: Job) -> float:
        """Time the job takes on this worker when batches are full."""
        new, cost = job.remaining_tokens, self.cost
        return new * self._sizes.token_s + cost.attention(new, job.context_tokens) + cost.request_s

    # -- the decision

    def next_batch(self, now: float) -> BatchPlan:
        self._loop.next_begins(len(self.jobs))
        if not self.jobs:
            return BatchPlan()
        if not self._sizes.still_fit(self.cost, self._target_s, self.max_batch_tokens):
            self._sizes = Sizes(self.cost, self._target_s, self.max_batch_tokens)
        self._give_up_late(now)
        sizes, start = self._sizes, now + self._sizes.least_batch_s
        kept, given_up = keep_most(list(self._hopeful.values()), start)
        budget = sizes.budget(self._waiting(kept, now), now)
        most = min(int(budget * MOST_GROWTH), self.max_batch_tokens)
        batch = Batch(self.cost, budget, most, self._rate.at(now), now)
        old = self._old(now)
        if old is not None:
            batch.take(old, max(int(budget * OLD_SHARE), 1))
        on_time = shortest_safe_first(kept, start, CAUTION, sizes.large * sizes.token_s)
        self._fill(batch, on_time, given_up, now)
        held = None if self._late or given_up else self._hold(kept, batch, now)
        if held is not None:
            return BatchPlan(wait_until_s=held)
        self._surprises.began(now)
        return BatchPlan(tuple(batch.chunks))

    def _fill(self, batch: Batch, on_time: Sequence[Due], given_up: Sequence[Due], now: float) -> None:
        """Those who can be on time, those given up and the late, each in their own order; of the three who are first
        the one whose work is worth most is next.

        A second of work ends one request of a second or ten of a tenth, so it is worth 1 / work, and more for who is
        about to become late. So the late and given up who are nearly done go before long work that has time.
        """
        lines = (
            ((self._worth(due, now), True, due.key) for due in on_time),
            ((1 / max(due.seconds, TINY_S), False, due.key) for due in given_up),
            ((1 / max(late.seconds, TINY_S), False, late.job.key) for _, _, late in self._late_queue),
        )
        for _, hopeful, key in merge(*lines, key=lambda item: -item[0]):
            if batch.full:
                break
            if hopeful:
                batch.add_on_time(self.jobs[key])
            else:
                batch.add(self.jobs[key])

    def _worth(self, due: Due, now: float) -> float:
        slack = max(due.deadline_s - now - due.seconds, 0.0)
        return (1 + URGENCY * exp(-slack / (URGENT * self._target_s))) / max(due.seconds, TINY_S)

    def _waiting(self, kept: list[Due], now: float) -> Waiting:
        rate, surprises, closed = self._rate.at(now), self._surprises.share, self._loop.closed
        return Waiting(kept, self._late_seconds, len(self.jobs), rate, surprises, closed)

    def _give_up_late(self, now: float) -> None:
        """Who could not be on time even alone is late from now on."""
        for due in list(self._hopeful.values()):
            if now + self._sizes.least_batch_s * 0.1 + due.seconds > due.deadline_s:
                del self._hopeful[due.key]
                self._become_late(self.jobs[due.key])

    def _old(self, now: float) -> Job | None:
        """The late request that came first, when it has waited out of proportion to the late work there is.

        Where much is late, everyone waits about as long as that work takes, and nobody is served sooner by taking time
        from those who can be on time. A small pile that is not served, though, is worth clearing, and nothing starves.
        """
        if not self._late:
            return None
        first = min((self.jobs[key] for key in self._late), key=lambda job: job.arrival_s)
        limit = OLD_TARGETS * self._target_s + OLD_PILES * self._late_seconds
        return first if now - first.arrival_s > limit else None

    def _hold(self, on_time: list[Due], batch: Batch, now: float) -> float | None:
        """Waiting pays only for a batch that is thin, alone, and made of requests that are not begun."""
        if batch.tokens >= self.cost.knee_tokens or len(batch.chunks) < len(on_time):
            return None
        oldest = min(job.arrival_s for job in on_time)
        return hold_until(now, oldest, len(on_time), batch.seconds, self._rate.at(now), now + batch.least_slack_s)
