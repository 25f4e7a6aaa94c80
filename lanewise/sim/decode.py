"""A simulated decode worker: iteration-level steps, admission by predicted peak, local prefill between steps.

Owns: the step loop of one instance; runs of identical steps are advanced at once. Must not: route or order prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil, sqrt

from lanewise.fleet import Role, WorkerStats, WorkerView
from lanewise.policy.admission import OutputLengths, peak_tokens
from lanewise.policy.batching import BatchPlan, BatchPolicy, Job
from lanewise.policy.profile import Profile
from lanewise.sim.loop import Loop
from lanewise.sim.prefill import Track, identity

RESERVE = 0.95  # of the pool is planned with, as the Past-Future rule does


@dataclass(slots=True)
class _Sequence:
    track: Track
    context: int  # tokens held when it was admitted
    admitted_step: int
    remaining: int  # output tokens left when it was admitted


class DecodeInstance:
    """Decodes what is ready, one token per step and sequence."""

    def __init__(
        self,
        index: int,
        loop: Loop,
        policy: BatchPolicy,
        profile: Profile,
        on_first: Callable[[Track], None],
        on_end: Callable[[Track], None],
        fingerprint: str,
        max_running: int = 512,
    ) -> None:
        self.index = index
        self.cost = profile.cost
        self.capacity = profile.kv_capacity_tokens
        self.policy = policy
        self.busy_s = 0.0
        self.preemptions = 0
        self._budget = policy.max_batch_tokens
        self._loop = loop
        self._on_first, self._on_end = on_first, on_end
        self._max_running = max_running
        self._waiting: deque[Track] = deque()
        self._running: dict[Hashable, _Sequence] = {}
        self._ends: list[tuple[int, Hashable]] = []  # (step after which it ends, key), lazily cleaned
        self._local: dict[Hashable, Track] = {}
        self._local_tokens = 0
        self._step = 0
        self._context = 0  # Σ context of the running
        self._active = False
        self._plan_id = 0  # number of the scheduled advance; an admission cuts it short
        self._from = 0.0  # when the run of steps under way began
        self._lengths = OutputLengths()
        self._identity = identity(Role.DECODE, index, profile, fingerprint)
        self._cost_map = profile.cost.to_mapping()

    def view(self) -> WorkerView:
        stats = WorkerStats(
            queued_requests=len(self._local),
            queued_tokens=self._local_tokens,
            running_requests=len(self._running) + len(self._waiting),
            running_context_tokens=self._context,
            kv_used_tokens=self._context,
            kv_capacity_tokens=self.capacity,
            cost=self._cost_map,
        )
        return WorkerView(self._identity, stats, True)

    def produced(self) -> int:
        """Output tokens so far of the sequences that decode now."""
        return sum(s.track.received + self._step - s.admitted_step for s in self._running.values())

    def deliver(self, track: Track) -> None:
        """KV and first token are here: decode from the next step border on."""
        self._waiting.append(track)
        self._cut()

    def submit_local(self, track: Track, ttft_target_s: float) -> None:
        """A prompt to compute here, in chunks between the decode steps."""
        uncached = track.request.prompt_tokens - track.cached + track.received
        job = Job(track.request.index, track.arrival_s, uncached, track.cached, track.arrival_s + ttft_target_s)
        self._local[job.key] = track
        self._local_tokens += uncached
        self.policy.add(job)
        self._cut()

    def _cut(self) -> None:
        """Something new: the run of steps under way ends at the first step border from now on."""
        now = self._loop.now
        if not self._active:
            self._active = True
            self._steps_planned = 0
            self._plan_id += 1
            self._loop.at(now, self._border, (self._plan_id, 0, None))
        elif self._steps_planned > 1:
            steps = self._steps_until(now - self._from)
            if steps < self._steps_planned:
                self._schedule(steps)

    _steps_planned = 0

    def _steps_until(self, elapsed: float) -> int:
        """Least number of whole steps that last at least `elapsed` (the context grows by one a sequence and step)."""
        running = len(self._running)
        base = self.cost.decode(running, self._context)
        slope = self.cost.kv_read_s * running
        b = base - slope / 2
        steps = (sqrt(b * b + 2 * slope * elapsed) - b) / slope
        return max(ceil(steps - 1e-9), 1)

    def _duration(self, steps: int) -> float:
        running = len(self._running)
        slope = self.cost.kv_read_s * running
        return steps * self.cost.decode(running, self._context) + slope * steps * (steps - 1) / 2

    def _schedule(self, steps: int) -> None:
        self._steps_planned = steps
        self._plan_id += 1
        self._loop.at(self._from + self._duration(steps), self._border, (self._plan_id, steps, None))

    def _border(self, argument: tuple[int, int, list[tuple[Hashable, int]] | None]) -> None:
        """`steps` steps have ended; finish, admit, and begin the next run."""
        plan_id, steps, chunks = argument
        if plan_id != self._plan_id:
            return
        now = self._loop.now
        if steps:
            self.busy_s += now - self._from
            self._advance(steps)
        if chunks:
            self.policy.observe(BatchPlan(tuple(chunks)), now, now - self._from)
        for key, new in chunks or ():
            self._computed(key, new)
        self._admit()
        self._from = now
        self._preempt()
        plan = None
        if self._local:
            # Decode first: sequences take their token from the budget, prompts get the rest.
            self.policy.max_batch_tokens = max(self._budget - len(self._running), 16)
            plan = self.policy.next_batch(now)
        if plan is not None and plan.chunks:
            jobs = self.policy.jobs
            work = [(new, jobs[k].context_tokens, new == jobs[k].remaining_tokens) for k, new in plan.chunks]
            duration = self.cost.mixed(work, len(self._running), self._context)
            self._steps_planned = 1
            self._plan_id += 1
            self._loop.at(now + duration, self._border, (self._plan_id, 1, list(plan.chunks)))
        elif self._running:
            while self._ends[0][1] not in self._running:
                heappop(self._ends)
            room = max((self.capacity - self._context) // len(self._running), 1)
            self._schedule(min(self._ends[0][0] - self._step, room))
        else:
            self._active = False

    def _advance(self, steps: int) -> None:
        self._step += steps
        self._context += steps * len(self._running)
        while self._ends and self._ends[0][0] <= self._step:
            _, key = heappop(self._ends)
            sequence = self._running.get(key)
            if sequence is None or sequence.admitted_step + sequence.remaining != self._step:
                continue
            del self._running[key]
            self._context -= sequence.context + sequence.remaining
            sequence.track.received = sequence.track.request.output_tokens
            self._finish(sequence.track)

    def _finish(self, track: Track) -> None:
        self._lengths.observe(track.request.output_tokens)
        track.end_s = self._loop.now
        self._on_end(track)

    def _computed(self, key: Hashable, new: int) -> None:
        """A chunk of a local prompt was computed."""
        self._local_tokens -= new
        done = self.policy.jobs[key].remaining_tokens == new
        self.policy.progress(key, new)
        if not done:
            return
        track = self._local.pop(key)
        if track.ttft_s is None:
            track.ttft_s = self._loop.now - track.arrival_s
            track.received = 1
            self._on_first(track)
        if track.received >= track.request.output_tokens:
            self._finish(track)
        else:
            self._waiting.append(track)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            track = self._waiting[0]
            held = track.request.prompt_tokens + track.received
            if self._running and not self._fits(held, track):
                return
            self._waiting.popleft()
            remaining = track.request.output_tokens - track.received
            key = track.request.index
            self._running[key] = _Sequence(track, held, self._step, remaining)
            self._context += held
            heappush(self._ends, (self._step + remaining, key))

    def _fits(self, held: int, candidate: Track) -> bool:
        """The predicted peak stays within the pool; the exact rule is asked only near the limit."""
        limit = self.capacity * RESERVE
        if self._context + held > limit:
            return False
        ceiling = self._lengths.remaining(0, 1 << 30) * 2
        if self._context + held + ceiling * (len(self._running) + 1) < limit:
            return True
        state = [(held, self._lengths.remaining(candidate.received, 1 << 30))]
        for sequence in self._running.values():
            grown = self._step - sequence.admitted_step
            generated = sequence.track.received + grown
            state.append((sequence.context + grown, self._lengths.remaining(generated, 1 << 30)))
        return peak_tokens(state) < limit

    def _preempt(self) -> None:
        """The prediction was wrong: those with the least progress go back and are recomputed here later."""
        while len(self._running) > 1 and self._context + len(self._running) > self.capacity:
            key = min(
                self._running,
                key=lambda k: self._step - self._running[k].admitted_step + self._running[k].track.received,
            )
            sequence = self._running.pop(key)
            grown = self._step - sequence.admitted_step
            self._context -= sequence.context + grown
            sequence.track.received += grown
            self._ends = [item for item in self._ends if item[1] != key]
            heapify(self._ends)
            self.preemptions += 1
            uncached = sequence.track.request.prompt_tokens + sequence.track.received
            self._local[key] = sequence.track
            self._local_tokens += uncached
            self.policy.add(Job(key, sequence.track.arrival_s, uncached, 0, float("inf")))
