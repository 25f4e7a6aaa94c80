"""The published LAPS policy, as its artifact runs it and with the paper's adaptive window, for comparison.

Owns: the 256-token split on total prompt length, strict short-first, the two waiting windows.
Must not: be improved. Where the paper is silent the artifact decides; the one repair is the depth estimate of the
adaptive window, which as printed only ever falls and so disables the window for good after one thin batch.
Batches of both classes take `max_batch_tokens`: the figures it is compared with (docs/scheduling.md) are of 8192 in
both. The artifact lets a long batch take 16384, which does worse.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from itertools import chain

from lanewise.policy.batching import BatchPlan, BatchPolicy, Job
from lanewise.policy.cost import CostModel

SHORT_TOKENS = 256
WINDOW_S = 0.005
WINDOW_REQUESTS = 8
MAX_WINDOW_S = 0.008  # the paper's best fixed window is 6–8 ms
MAX_DEPTH = 64


class Laps(BatchPolicy):
    """Two queues by total prompt length, short first without ageing; thin short batches wait 5 ms or for 8."""

    def __init__(self, *, max_batch_tokens: int, cost: CostModel) -> None:
        super().__init__(max_batch_tokens=max_batch_tokens, cost=cost)
        self._short: deque[Hashable] = deque()
        self._long: deque[Hashable] = deque()
        self._chunked: Hashable | None = None  # a prompt cut at the budget rides in the next batch of either class

    def _enqueue(self, job: Job) -> None:
        short = job.remaining_tokens + job.context_tokens <= SHORT_TOKENS
        (self._short if short else self._long).append(job.key)

    def _dequeue(self, job: Job) -> None:
        if self._chunked == job.key:
            self._chunked = None

    def _requeue(self, before: Job, after: Job) -> None:
        self._chunked = after.key

    def _live(self, queue: deque[Hashable]) -> deque[Hashable]:
        while queue and queue[0] not in self.jobs:
            queue.popleft()
        return queue

    def next_batch(self, now: float) -> BatchPlan:
        short, long = self._live(self._short), self._live(self._long)
        if short:
            until = self._hold_until(now)
            if until is not None and not (long or self._chunked):
                return BatchPlan(wait_until_s=until)
            return self._build(short)
        return self._build(long)

    def _hold_until(self, now: float) -> float | None:
        """When to stop waiting for more short requests; None: now."""
        waiting = [self.jobs[key] for key in self._short if key in self.jobs]
        until = waiting[0].arrival_s + WINDOW_S
        return None if len(waiting) >= WINDOW_REQUESTS or now >= until else until

    def _build(self, queue: deque[Hashable]) -> BatchPlan:
        """First come first served within the class, behind the prompt that was cut."""
        cut = () if self._chunked is None else (self._chunked,)
        budget = self.max_batch_tokens
        chunks: list[tuple[Hashable, int]] = []
        for key in chain(cut, (key for key in queue if key in self.jobs and key not in cut)):
            if budget <= 0:
                break
            new = min(self.jobs[key].remaining_tokens, budget)
            chunks.append((key, new))
            budget -= new
        return BatchPlan(tuple(chunks))


class LapsAdaptive(Laps):
    """The paper's adaptive window: wait for the expected depth, never past the least slack."""

    def __init__(self, *, max_batch_tokens: int, cost: CostModel) -> None:
        super().__init__(max_batch_tokens=max_batch_tokens, cost=cost)
        self._depth = float(WINDOW_REQUESTS)

    def _hold_until(self, now: float) -> float | None:
        waiting = [self.jobs[key] for key in self._short if key in self.jobs]
        service = self.cost.prefill((job.remaining_tokens, job.context_tokens, True) for job in waiting)
        slack_end = min(job.ttft_deadline_s for job in waiting) - service
        until = min(waiting[0].arrival_s + MAX_WINDOW_S, slack_end)
        if len(waiting) < min(self._depth, MAX_DEPTH) and now < until:
            return until
        self._depth += 0.25 * (len(waiting) + 1 - self._depth)  # both up and down: see the module's charter
        return None
