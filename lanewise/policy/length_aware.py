"""The length-aware batching policy: who can be on time goes first, least work first; the late follow, none starves.

Owns: the order of computation in a prefill worker and the size of its batches.
Must not: read a clock, or tune itself to anything but the cost model, the targets and the queue it sees.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf, sqrt

from lanewise.policy.batching import BatchPlan, BatchPolicy, Job
from lanewise.policy.cost import CostModel
from lanewise.policy.feasible import Due, keep_most, shortest_safe_first
from lanewise.policy.sizing import QUANTUM, Sizes, Waiting
from lanewise.policy.window import ArrivalRate, Surprises, hold_until

DEFAULT_TARGET_S = 0.4
CAUTION = 1.5  # a request is overtaken only while its slack is this many times the work that overtakes it
SENIORITY = 4.0  # a late request ranks as if it had come this many times its own work later ...
SENIORITY_CAP = 25.0  # ... but at most this many targets: ageing
OLD_TARGETS = 7.0  # a late request is old after this many targets ...
OLD_PILES = 4.0  # ... and this many times the late work that waits: an old one among little work is due a share,
OLD_SHARE = 0.3  # of every batch; old ones among much work are served in turn anyway


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
        rank = job.arrival_s + min(SENIORITY * seconds, SENIORITY_CAP * self._target_s)
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
        if not self.jobs:
            return BatchPlan()
        if not self._sizes.still_fit(self.cost, self._target_s, self.max_batch_tokens):
            self._sizes = Sizes(self.cost, self._target_s, self.max_batch_tokens)
        self._give_up_late(now)
        sizes, start = self._sizes, now + self._sizes.least_batch_s
        kept, given_up = keep_most(list(self._hopeful.values()), start)
        budget = sizes.budget(self._waiting(kept, now), now)
        batch = _Batch(self.cost, budget, now)
        old = self._old(now)
        if old is not None:
            batch.take(old, max(int(budget * OLD_SHARE), 1))
        on_time = [self.jobs[due.key] for due in shortest_safe_first(kept, start, CAUTION, sizes.large * sizes.token_s)]
        for job in on_time:
            batch.add_on_time(job)
        for due in given_up:
            batch.add(self.jobs[due.key])
        for _, _, late in self._late_queue:
            if batch.full or not batch.add(late.job):
                break
        held = None if self._late or given_up else self._hold(on_time, batch, now)
        if held is not None:
            return BatchPlan(wait_until_s=held)
        self._surprises.began(now)
        return BatchPlan(tuple(batch.chunks))

    def _waiting(self, kept: list[Due], now: float) -> Waiting:
        return Waiting(kept, self._late_seconds, len(self.jobs), self._rate.at(now), self._surprises.share)

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

    def _hold(self, on_time: list[Job], batch: _Batch, now: float) -> float | None:
        """Waiting pays only for a batch that is thin, alone, and made of requests that are not begun."""
        if batch.tokens >= self.cost.knee_tokens or len(batch.chunks) < len(on_time):
            return None
        oldest = min(job.arrival_s for job in on_time)
        return hold_until(now, oldest, len(on_time), batch.seconds, self._rate.at(now), now + batch.least_slack_s)


class _Batch:
    """A batch in the making."""

    def __init__(self, cost: CostModel, budget: int, now: float) -> None:
        self.chunks: list[tuple[Hashable, int]] = []
        self.tokens = 0
        self._cost, self._budget, self._now = cost, budget, now
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
        self.chunks.append((job.key, new))
        self.tokens += new
        self._attention_s += self._cost.attention(new, job.context_tokens)
        self._taken = job.key

    def add_on_time(self, job: Job) -> None:
        """A request that can be on time: all of it, or what the budget leaves; never at the price of one already in."""
        room = self._budget - self.tokens
        if room <= 0 or job.key == self._taken:
            return
        new = min(job.remaining_tokens, room)
        finishes = new == job.remaining_tokens
        slack = job.ttft_deadline_s - self._now
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

    def add(self, job: Job) -> bool:
        """Work that is late or given up: fills what is left, within the quantum in seconds; False: no room."""
        if job.key == self._taken:
            return True
        new = min(job.remaining_tokens, self._budget - self.tokens)
        if self.chunks:
            new = min(new, self._fitting(job, min(self._quantum_s, self._least_s)))
        if new <= 0 or (self.chunks and new < min(job.remaining_tokens, MIN_FILLER)):
            return False
        self._put(job, new, self._cost.attention(new, job.context_tokens))
        return True

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


MIN_FILLER = 64  # fewer tokens than this of a long late prompt are not worth a chunk (its context is read again)
