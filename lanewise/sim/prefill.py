"""A simulated prefill worker: a batch policy, a prefix cache, one batch at a time.

Owns: the batch loop of one instance and what it tells the router. Must not: choose anything; the policy does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lanewise.fleet import Lane, Role, WorkerIdentity, WorkerStats, WorkerView
from lanewise.policy.batching import BatchPlan, BatchPolicy, Job
from lanewise.policy.cost import CostModel
from lanewise.policy.profile import Profile
from lanewise.sim.loop import Loop
from lanewise.sim.workload import BLOCK_TOKENS, Request


@dataclass(slots=True)
class Track:
    """One request on its way, and what was measured of it."""

    request: Request
    arrival_s: float
    cached: int = 0  # at the worker that prefills it, when it was routed
    ttft_s: float | None = None
    end_s: float | None = None
    prefill: int | None = None  # index of the prefill instance, None: local
    decode: int = 0
    prefill_end_s: float = 0.0
    link_end_s: float = 0.0
    received: int = 0  # output tokens so far
    extra: dict[str, float] = field(default_factory=dict)


class PrefixCache:
    """LRU over 512-token blocks; `capacity_blocks` 0: nothing is ever cached."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, blocks: Iterable[int]) -> int:
        """Leading cached tokens; takes no reference."""
        if not self._blocks:
            return 0
        count = 0
        for block in blocks:
            if block not in self._blocks:
                break
            count += 1
        return count * BLOCK_TOKENS

    def insert(self, blocks: Iterable[int]) -> None:
        if not self._capacity:
            return
        for block in blocks:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def __len__(self) -> int:
        return len(self._blocks)


def identity(role: Role, index: int, profile: Profile, fingerprint: str) -> WorkerIdentity:
    """What the router sees of a simulated worker."""
    name = f"{role.value}-{index}"
    unbounded = 1 << 30  # a trace's prompts are served whatever their length: attainment counts all arrivals
    return WorkerIdentity(role, name, name, "", "", "sim", fingerprint, {}, unbounded, unbounded, 1, profile.name, 0)


class PrefillInstance:
    """Computes prompts in the batches its policy plans."""

    def __init__(
        self,
        index: int,
        loop: Loop,
        policy: BatchPolicy,
        profile: Profile,
        cache_blocks: int,
        on_chunk: Callable[[Track, int, bool], None],
        fingerprint: str,
    ) -> None:
        self.index = index
        self.policy = policy
        self.cost: CostModel = profile.cost
        self.cache = PrefixCache(cache_blocks)
        self.busy_s = 0.0
        self.batches = 0
        self.queued_tokens = 0
        self.queued_requests = 0
        self._loop = loop
        self._on_chunk = on_chunk
        self._tracks: dict[Hashable, Track] = {}
        self._identity = identity(Role.PREFILL, index, profile, fingerprint)
        self._cost_map = profile.cost.to_mapping()
        self._running = False
        self._wake = 0  # number of the last hold; older wake-ups are void
        self._since_tokens = 0
        self._since_requests = 0
        self._stats = WorkerStats(cost=self._cost_map)
        self._batch_end_s = 0.0
        self.lane = Lane.ANY
        self._lane_since_s, self._lane_generation = 0.0, 0

    def submit(self, track: Track, ttft_target_s: float) -> None:
        """A routed request arrives."""
        uncached = track.request.prompt_tokens - track.cached
        job = Job(track.request.index, track.arrival_s, uncached, track.cached, track.arrival_s + ttft_target_s)
        self._tracks[job.key] = track
        self.policy.add(job)
        self.queued_tokens += uncached
        self.queued_requests += 1
        self._since_tokens += uncached
        self._since_requests += 1
        if not self._running:
            self._running = True
            # All arrivals of this instant are in before the first batch is planned.
            self._loop.at(self._loop.now, self._start)
        else:
            self._interrupt_hold()

    def view(self) -> WorkerView:
        """What the router sees: the stats of the last batch border, aged, plus what it has submitted since."""
        if not self._running:
            stats = self._idle_stats()
            return WorkerView(self._identity, stats, True, 0, 0)
        stats = replace(self._stats, queue_wait_s=max(self._batch_end_s - self._loop.now, 0.0), **self._lane())
        return WorkerView(self._identity, stats, True, self._since_requests, self._since_tokens)

    def set_lane(self, lane: Lane) -> None:
        self.lane, self._lane_since_s = lane, self._loop.now
        self._lane_generation += 1

    def _lane(self) -> dict[str, Any]:
        age = self._loop.now - self._lane_since_s
        return {"lane": self.lane, "lane_generation": self._lane_generation, "lane_age_s": age}

    def _idle_stats(self) -> WorkerStats:
        cached = len(self.cache) * BLOCK_TOKENS
        return WorkerStats(cost=self._cost_map, kv_cached_tokens=cached, **self._lane())

    def _interrupt_hold(self) -> None:
        if self._wake % 2:  # odd: holding
            self._wake += 1
            self._loop.at(self._loop.now, self._start)

    def _start(self, _: object) -> None:
        now = self._loop.now
        plan = self.policy.next_batch(now)
        if not plan.chunks:
            if plan.wait_until_s is None:
                self._running = False
            else:
                self._wake += 1 + self._wake % 2
                self._loop.at(plan.wait_until_s, self._end_hold, self._wake)
            return
        duration = self._duration(plan)
        self.busy_s += duration
        self.batches += 1
        self._batch_end_s = now + duration
        self._publish(plan.tokens)
        self._loop.at(now + duration, self._end, (plan, duration))

    def _end_hold(self, wake: int) -> None:
        if wake == self._wake:
            self._wake += 1
            self._start(None)

    def _duration(self, plan: BatchPlan) -> float:
        jobs, cost = self.policy.jobs, self.cost
        tokens = finishing = 0
        attention = 0.0
        for key, new in plan.chunks:
            job = jobs[key]
            tokens += new
            attention += cost.attention(new, job.context_tokens)
            finishing += new == job.remaining_tokens
        return cost.batch(tokens, attention, finishing, len(plan.chunks))

    def _publish(self, running_tokens: int) -> None:
        self._stats = WorkerStats(
            queued_requests=self.queued_requests,
            queued_tokens=self.queued_tokens - running_tokens,
            cost=self._cost_map,
            kv_cached_tokens=len(self.cache) * BLOCK_TOKENS,
        )
        self._since_tokens = self._since_requests = 0

    def _end(self, argument: tuple[BatchPlan, float]) -> None:
        plan, duration = argument
        self.policy.observe(plan, self._loop.now, duration)  # first: the ends below may bring new requests at once
        for key, new in plan.chunks:
            done = self.policy.jobs[key].remaining_tokens == new
            self.policy.progress(key, new)
            self.queued_tokens -= new
            track = self._tracks[key]
            if done:
                del self._tracks[key]
                self.queued_requests -= 1
                if track.request.block_ranges:
                    self.cache.insert(track.request.blocks())
            self._on_chunk(track, new, done)
        self._start(None)
