"""Which tokens a prefill worker computes next: the records, the interface, and the policies by name.

Owns: `Job`, `BatchPlan`, the interface `BatchPolicy` and `make_batch_policy`. The policies themselves are in
`length_aware.py` (ours), `baselines.py` (textbook orders) and `published.py` (LAPS).
Must not: run batches, read a clock, or know pages; the worker's loop and the simulator do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from lanewise.fleet import Lane
from lanewise.policy.cost import CostModel


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt that is not computed yet, or not wholly."""

    key: Hashable
    arrival_s: float
    remaining_tokens: int  # uncached and not yet computed
    context_tokens: int = 0  # cached + computed
    ttft_deadline_s: float = float("inf")  # arrival + soft target
    started: bool = False  # part of it has been computed here
    lane: Lane = Lane.ANY


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What to compute now. No chunks and a `wait_until_s`: hold, and ask again then or when a job arrives."""

    chunks: tuple[tuple[Hashable, int], ...] = ()
    wait_until_s: float | None = None

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.chunks)


class BatchPolicy(ABC):
    """A queue of jobs that says what to compute next.

    Two ways to use it, not to be mixed on one object. Stateful, which costs O(log n) a job: `add`, `remove`, `progress`
    after each batch, `next_batch(now)`. Stateless: `plan(jobs, now)` with all jobs each time, which brings the queue in
    line with them.
    """

    def __init__(self, *, max_batch_tokens: int, cost: CostModel) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, not {max_batch_tokens}")
        self.max_batch_tokens = max_batch_tokens
        self.cost = cost  # may be replaced by a refitted one between batches
        self.jobs: dict[Hashable, Job] = {}

    def add(self, job: Job) -> None:
        """A job arrived. A key that is already here is replaced."""
        if job.key in self.jobs:
            self.remove(job.key)
        self.jobs[job.key] = job
        self._enqueue(job)

    def remove(self, key: Hashable) -> None:
        """A job left before it was computed (cancelled); unknown keys are ignored."""
        job = self.jobs.pop(key, None)
        if job is not None:
            self._dequeue(job)

    def progress(self, key: Hashable, tokens: int) -> None:
        """`tokens` of the job were computed; with none left it leaves the queue."""
        job = self.jobs.get(key)
        if job is None:
            return
        if tokens >= job.remaining_tokens:
            del self.jobs[key]
            self._dequeue(job)
            return
        after = replace(
            job,
            remaining_tokens=job.remaining_tokens - tokens,
            context_tokens=job.context_tokens + tokens,
            started=True,
        )
        self.jobs[key] = after
        self._requeue(job, after)

    def plan(self, jobs: Sequence[Job], now: float) -> BatchPlan:
        """The next batch of exactly these jobs: brings the queue in line with them first."""
        wanted = {job.key: job for job in jobs}
        for key in [key for key in self.jobs if key not in wanted]:
            self.remove(key)
        for key, job in wanted.items():
            known = self.jobs.get(key)
            if known is None:
                self.add(job)
            elif known != job:
                self.jobs[key] = job
                self._requeue(known, job)
        return self.next_batch(now)

    def observe(self, plan: BatchPlan, now: float, duration_s: float) -> None:  # noqa: B027 - optional
        """A batch ended at `now` after `duration_s`; policies that adapt to measured times use it."""

    @abstractmethod
    def next_batch(self, now: float) -> BatchPlan:
        """The next batch of the jobs added so far. Never changes what is left of a job: `progress` does."""

    @abstractmethod
    def _enqueue(self, job: Job) -> None: ...

    def _dequeue(self, job: Job) -> None:  # noqa: B027 - lazy queues skip stale entries instead
        """The job left; queues that skip stale entries need nothing here."""

    def _requeue(self, before: Job, after: Job) -> None:
        """The job was computed in part."""
        self._dequeue(before)
        self._enqueue(after)


def fill(jobs: Sequence[Job], budget: int) -> tuple[tuple[Hashable, int], ...]:
    """Chunks of the jobs in the order given until the budget is used."""
    chunks = []
    for job in jobs:
        if budget <= 0:
            break
        new = min(job.remaining_tokens, budget)
        chunks.append((job.key, new))
        budget -= new
    return tuple(chunks)


def make_batch_policy(name: str, *, max_batch_tokens: int, cost: CostModel) -> BatchPolicy:
    """A policy by name. A number at the end (`fcfs-8192`) overrides `max_batch_tokens`; see `POLICY_NAMES`."""
    from lanewise.policy.baselines import Fcfs, Spf, Srpt  # the policies import the records above
    from lanewise.policy.length_aware import LengthAware
    from lanewise.policy.published import Laps, LapsAdaptive

    base, _, number = name.rpartition("-")
    if not number.isdigit():
        base, number = name, str(max_batch_tokens)
    policies: dict[str, type[BatchPolicy]] = {
        "lanewise": LengthAware,
        "fcfs": Fcfs,
        "spf": Spf,
        "srpt": Srpt,
        "laps": Laps,
        "laps-adaptive": LapsAdaptive,
    }
    if base not in policies:
        raise ValueError(f"unknown batch policy {name!r}; known: {', '.join(POLICY_NAMES)}")
    return policies[base](max_batch_tokens=int(number), cost=cost)


POLICY_NAMES = (
    "lanewise",
    "fcfs-8192",
    "fcfs-1024",
    "spf-8192",
    "srpt-512",
    "srpt-1024",
    "laps-8192",
    "laps-adaptive-8192",
)
"""The names the comparisons use; any budget may follow the dash, and without one the worker's own is used."""
