"""Textbook batch orders, kept runnable for comparison: first come first served, shortest prefill first, SRPT.

Owns: three orders over one lazy heap. Must not: look at deadlines or lanes; that is what they are compared for.
"""

from __future__ import annotations

from abc import abstractmethod
from heapq import heappop, heappush

from lanewise.policy.batching import BatchPlan, BatchPolicy, Job
from lanewise.policy.cost import CostModel


class _Ordered(BatchPolicy):
    """Fills each batch in the order of `_rank`; entries of the heap that no longer describe a job are skipped."""

    def __init__(self, *, max_batch_tokens: int, cost: CostModel) -> None:
        super().__init__(max_batch_tokens=max_batch_tokens, cost=cost)
        self._heap: list[tuple[tuple[float, ...], int, Job]] = []
        self._count = 0  # the last tie-break: order of entry

    @abstractmethod
    def _rank(self, job: Job) -> tuple[float, ...]: ...

    def _enqueue(self, job: Job) -> None:
        self._count += 1
        heappush(self._heap, (self._rank(job), self._count, job))

    def next_batch(self, now: float) -> BatchPlan:
        budget, chunks, taken = self.max_batch_tokens, [], []
        while budget > 0 and self._heap:
            entry = heappop(self._heap)
            job = entry[2]
            if self.jobs.get(job.key) is not job:
                continue
            taken.append(entry)
            new = min(job.remaining_tokens, budget)
            chunks.append((job.key, new))
            budget -= new
        for entry in taken:  # they stay queued until `progress` says otherwise
            heappush(self._heap, entry)
        return BatchPlan(tuple(chunks))


class Fcfs(_Ordered):
    """First come first served, prompts cut at the budget."""

    def _rank(self, job: Job) -> tuple[float, ...]:
        return (job.arrival_s,)


class Spf(_Ordered):
    """Shortest prefill first, after cache hits; a prompt that was begun is finished first (no preemption)."""

    def _rank(self, job: Job) -> tuple[float, ...]:
        return (not job.started, job.remaining_tokens, job.arrival_s)


class Srpt(_Ordered):
    """Shortest remaining processing time, preempting at chunk borders."""

    def _rank(self, job: Job) -> tuple[float, ...]:
        return (job.remaining_tokens, job.arrival_s)
