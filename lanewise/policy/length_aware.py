"""The length-aware batching policy: who can still be on time goes first by least work, the late follow by arrival.

Owns: the order of computation in a prefill worker and the size of its batches.
Must not: read a clock or hold requests back for other workers; routing does.
"""

from __future__ import annotations

from collections.abc import Hashable

from lanewise.policy.batching import BatchPlan, BatchPolicy, Job, fill
from lanewise.policy.cost import CostModel


class LengthAware(BatchPolicy):
    """Feasible requests by least remaining work in bounded chunks, late requests behind them in arrival order."""

    def __init__(self, *, max_batch_tokens: int, cost: CostModel) -> None:
        super().__init__(max_batch_tokens=max_batch_tokens, cost=cost)
        self._hopeful: dict[Hashable, Job] = {}
        self._late: dict[Hashable, Job] = {}

    def _enqueue(self, job: Job) -> None:
        self._hopeful[job.key] = job

    def _dequeue(self, job: Job) -> None:
        self._hopeful.pop(job.key, None)
        self._late.pop(job.key, None)

    def next_batch(self, now: float) -> BatchPlan:
        for job in list(self._hopeful.values()):
            needed = self.cost.chunked(job.remaining_tokens, job.context_tokens, self.max_batch_tokens)
            if now + needed > job.ttft_deadline_s:
                self._late[job.key] = self._hopeful.pop(job.key)
        order = sorted(self._hopeful.values(), key=lambda job: (job.remaining_tokens, job.arrival_s))
        order += sorted(self._late.values(), key=lambda job: job.arrival_s)
        return BatchPlan(fill(order, self.max_batch_tokens))
