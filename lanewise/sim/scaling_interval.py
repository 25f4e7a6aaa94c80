"""A day in intervals: each served as the event simulator serves a steady load of that rate with those workers.

Owns: the quasi-steady model (queues by work per second, shares on time from `scaling_response`), pods that start and
go, GPU time. Must not: decide; a controller does.

Why: a day at 40 GPUs is 6.5 million requests, more than an event simulator in Python does in an hour, and a table of
autoscalers needs hundreds of such days. The rate of a day changes by less than a tenth in ten minutes and a queue
settles in seconds to minutes, so each interval is in balance. tests/sim compares this model with the event simulator.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import sqrt

from lanewise.policy.profile import Profile
from lanewise.policy.scaling_capacity import step_s
from lanewise.policy.scaling_types import Demand, Observation, RoleView
from lanewise.sim.scaling_controllers import SYNC_S, Controller, Measured
from lanewise.sim.scaling_day import Day, Mix, Period, periods
from lanewise.sim.scaling_response import Response


@dataclass(frozen=True, slots=True)
class World:
    """One service and its day, the same for every controller."""

    day: Day
    mix: Mix
    response: Response
    profile: Profile
    ttft_s: float
    tpot_s: float
    start_s: float
    load: tuple[Period, ...]
    seed: int

    @classmethod
    def make(
        cls,
        day: Day,
        mix: Mix,
        response: Response,
        profile: Profile,
        ttft_s: float,
        tpot_s: float,
        start_s: float,
        seed: int,
    ) -> World:
        load = tuple(periods(day, mix, int(SYNC_S), seed))
        return cls(day, mix, response, profile, ttft_s, tpot_s, start_s, load, seed)

    def on_time(self, prefill: int, decode: int, rate: float) -> float:
        """Share of requests that meet both targets at a steady rate."""
        if prefill < 1 or decode < 1:
            return 0.0
        ttft = self.response.attained.at(prefill, rate * self.mix.work_s / prefill)
        return ttft * self.in_pace(decode, rate)

    def in_pace(self, decode: int, rate: float) -> float:
        """Share within the TPOT target but for what waits: what is more than can be served waits, see `_patient`."""
        if decode < 1:
            return 0.0
        tpot = self.response.tpot
        return tpot.at(decode, min(rate / (decode * self.response.full_rate), tpot.loads[-1]))


@dataclass(slots=True)
class Result:
    """What one controller made of the day. `moves`: (second, prefill, decode, reason)."""

    gpu_hours: float = 0.0
    attained: float = 0.0
    moves: list[tuple[float, int, int, str]] = field(default_factory=list)
    peak_gpus: int = 0

    def turns(self) -> tuple[int, int]:
        """Changes of direction of each role."""
        return turns([move[1] for move in self.moves]), turns([move[2] for move in self.moves])


def turns(counts: Sequence[int]) -> int:
    """How often a sequence that rose falls, or the other way round."""
    found = last = 0
    for before, after in pairwise(counts):
        direction = (after > before) - (after < before)
        if direction and last and direction != last:
            found += 1
        last = direction or last
    return found


class _Pods:
    """One role's pods: when each was asked for, and so when it is ready."""

    def __init__(self, count: int, start_s: float) -> None:
        self._start_s = start_s
        self._since = [-start_s] * count

    @property
    def desired(self) -> int:
        return len(self._since)

    def ready(self, now: float) -> int:
        return sum(since + self._start_s <= now for since in self._since)

    def scale(self, now: float, count: int) -> None:
        """The youngest go first, as a ReplicaSet has it."""
        del self._since[count:]
        self._since += [now] * (count - len(self._since))


def run(world: World, controller: Controller, first: tuple[int, int]) -> Result:
    """The whole day under one controller, from `first` workers that are up already."""
    return _Run(world, controller, first).run()


class _Run:
    def __init__(self, world: World, controller: Controller, first: tuple[int, int]) -> None:
        self.world, self.controller = world, controller
        self.pods = _Pods(first[0], world.start_s), _Pods(first[1], world.start_s)
        self.work_s = 0.0  # prefill work that waits or runs, in seconds of one worker
        self.behind = 0.0  # requests that decode has not begun because it is full
        self.served_output = 0.0
        self.held: dict[int, float] = {}  # sequences per decode worker, by count: where the next search starts
        self.draw = random.Random(world.seed + 1)
        self.result = Result(moves=[(0.0, *first, "start")])

    def run(self) -> Result:
        world, now, all_requests, good = self.world, 0.0, 0.0, 0.0
        for period in world.load:
            p, d = self.pods[0].ready(now), self.pods[1].ready(now)
            measured, share = self._serve(now, period, p, d)
            all_requests += period.demand.requests
            good += share * period.demand.requests
            demand = self._account(period.demand, p, measured)
            now += SYNC_S
            measured = replace(measured, at_s=now)
            self._move(now, measured, demand)
            gpus = (self.pods[0].desired + self.pods[1].desired) * world.profile.gpus
            self.result.peak_gpus = max(self.result.peak_gpus, gpus)
            self.result.gpu_hours += gpus * SYNC_S / 3600
        self.result.attained = good / max(all_requests, 1)
        return self.result

    def _serve(self, now: float, period: Period, p: int, d: int) -> tuple[Measured, float]:
        """One period: what can be measured of it, and the share of its requests that are on time."""
        world, rate = self.world, self.world.day.rate(now + SYNC_S / 2)
        busy = 0.0
        for work in period.work_s:
            done = min(self.work_s + work, float(p))
            self.work_s += work - done
            busy += done
        in_service = busy / SYNC_S  # workers' worth
        waiting = max(self.work_s / world.mix.work_s, 0.0)
        running, kv = self._decode(rate, d)
        share = world.on_time(p, d, rate) * self._patient(d)
        measured = Measured(
            now, self.pods[0].desired, self.pods[1].desired, p, d,
            in_service / max(p, 1), waiting, waiting + in_service, running, kv,
        )  # fmt: skip
        return measured, share

    def _decode(self, rate: float, d: int) -> tuple[float, float]:
        """(sequences under way, share of KV in use), random as a number of customers is."""
        world, capacity = self.world, self.world.profile.kv_capacity_tokens
        output = world.mix.output_tokens
        context = world.mix.prompt_tokens + output
        full = world.response.full_rate * d
        self.behind = max(self.behind + (rate - full) * SYNC_S, 0.0)
        held = self.held.get(d, 0.5)
        for _ in range(3 if d in self.held else 12):  # Little's law with steps that grow with what is held
            held = min(
                min(rate, full) / max(d, 1) * output * step_s(held, context, world.profile.cost), capacity / context
            )
        self.held[d] = held
        mean = held * d
        running = max(self.draw.gauss(mean, sqrt(mean)), 0.0) if mean > 0 else 0.0
        return running + self.behind, min(running * context / max(d * capacity, 1), 1.0)

    def _patient(self, d: int) -> float:
        """Share of requests whose TPOT bears the wait for room in decode: it is spread over all their tokens."""
        if self.behind <= 0:
            return 1.0
        if not d:
            return 0.0
        world = self.world
        wait_s = self.behind / (world.response.full_rate * d)
        context = world.mix.prompt_tokens + world.mix.output_tokens
        spare_s = world.tpot_s - step_s(self.held[d], context, world.profile.cost)
        return world.mix.longer_than(wait_s / spare_s) if spare_s > 0 else 0.0

    def _account(self, demand: Demand, p: int, measured: Measured) -> Demand:
        """What the routers would count beside the arrivals: ends, tokens sent, requests that were late."""
        world = self.world
        rate = world.day.rate(measured.at_s)
        lost = 1 - world.response.kept.at(p, rate * world.mix.work_s / p) if p else 1.0
        life = world.mix.output_tokens * 0.03
        self.served_output += (demand.output_tokens - self.served_output) * min(SYNC_S / (SYNC_S + life), 1.0)
        late = demand.attainable * lost
        in_time = world.in_pace(measured.decode_ready, rate) * self._patient(measured.decode_ready)
        return replace(
            demand,
            output_tokens=self.served_output,
            finished=demand.requests,
            ttft_late=self._whole(late),
            tpot_late=self._whole(demand.requests * (1 - in_time)),
        )

    def _whole(self, count: float) -> int:
        return int(count) + (self.draw.random() < count % 1)

    def _move(self, now: float, measured: Measured, demand: Demand) -> None:
        counts = self.controller.counts(measured, lambda: self._observation(now, measured, demand))
        if counts != (self.pods[0].desired, self.pods[1].desired):
            self.result.moves.append((now, *counts, self.controller.reason))
        for pods, count in zip(self.pods, counts, strict=True):
            pods.scale(now, count)

    def _observation(self, now: float, measured: Measured, demand: Demand) -> Observation:
        world, profile = self.world, self.world.profile
        tokens = world.mix.uncached_tokens
        roles = [
            RoleView(
                pods.desired,
                pods.ready(now),
                cost=profile.cost,
                kv_capacity_tokens=profile.kv_capacity_tokens,
                gpus=profile.gpus,
                watts=profile.watts,
            )
            for pods in self.pods
        ]
        return Observation(
            now, demand, roles[0], roles[1],
            queued_tokens=measured.prefill_waiting * tokens, running=measured.decode_running, start_s=world.start_s,
        )  # fmt: skip
