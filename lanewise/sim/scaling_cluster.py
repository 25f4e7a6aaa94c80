"""The event simulator with counts that change: workers start, serve, drain and go; a controller says how many.

Owns: the life of simulated workers, their GPU time, and what the routers and workers would report to the operator.
Must not: decide. Requests that find no worker are held, as the router holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from lanewise.fleet import FleetSnapshot, WorkerView
from lanewise.policy.profile import Profile
from lanewise.policy.scaling_meter import DemandMeter
from lanewise.policy.scaling_types import Demand, Observation, RoleView
from lanewise.sim.cluster import Cluster, Outcome, SimConfig
from lanewise.sim.decode import DecodeInstance
from lanewise.sim.prefill import PrefillInstance, Track
from lanewise.sim.report import tpot_s
from lanewise.sim.scaling_controllers import SYNC_S, Controller, Measured
from lanewise.sim.workload import Request, Workload

Instance = PrefillInstance | DecodeInstance
Floors = Callable[[float], tuple[int, int, str]]


def no_floors(at_s: float) -> tuple[int, int, str]:
    return 0, 0, ""


class Life(Enum):
    OFF = "off"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(slots=True)
class Worker:
    instance: Instance
    life: Life = Life.OFF
    since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ScaledService:
    """What is simulated beside the workload: `config` holds as many workers as there may ever be."""

    config: SimConfig
    first: tuple[int, int]
    start_s: float
    floors: Floors = no_floors


class CountingCluster(Cluster):
    """A router that remembers what it has sent to each decode worker and what has not ended there, as the real one."""

    def __init__(self, config: SimConfig, workload: Workload, on_progress: Callable[[int], None] | None = None) -> None:
        super().__init__(config, workload, on_progress)
        self.bound_for = [0] * len(self.decode)
        self.bound_tokens = [0] * len(self.decode)

    def _route(self, request: Request) -> None:
        before = len(self.tracks)
        super()._route(request)
        track = self.tracks[before]
        if track.end_s is None:
            self.bound_for[track.decode] += 1
            self.bound_tokens[track.decode] += request.prompt_tokens

    def _on_end(self, track: Track) -> None:
        super()._on_end(track)
        self.bound_for[track.decode] -= 1
        self.bound_tokens[track.decode] -= track.request.prompt_tokens

    def _decode_view(self, instance: DecodeInstance) -> WorkerView:
        """The worker's own word, and what is still on its way to it."""
        view = instance.view()
        coming = max(self.bound_for[instance.index] - view.stats.running_requests, 0)
        tokens = max(self.bound_tokens[instance.index] - view.stats.running_context_tokens, 0) if coming else 0
        return replace(view, inflight_requests=coming, inflight_tokens=tokens)

    def _fleet(self) -> FleetSnapshot:
        return FleetSnapshot(
            tuple([item.view() for item in self.prefill]), tuple([self._decode_view(item) for item in self.decode])
        )


class ScaledCluster(CountingCluster):
    """`run()` as ever; afterwards `gpu_hours`, `price` and `moves`."""

    def __init__(
        self,
        service: ScaledService,
        workload: Workload,
        controller: Controller,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(service.config, workload, on_progress)
        self.service, self.controller = service, controller
        self.gpu_hours = self.price = 0.0
        self.moves: list[tuple[float, int, int, str]] = [(0.0, *service.first, "start")]
        self.reason = ""
        self._roles: tuple[list[Worker], list[Worker]] = (
            [Worker(item) for item in self.prefill],
            [Worker(item) for item in self.decode],
        )
        for workers, count in zip(self._roles, service.first, strict=True):
            for worker in workers[:count]:
                worker.life = Life.READY
        self._held: list[Request] = []
        self._meter = DemandMeter(
            self.config.ttft_target_s, self.config.tpot_target_s, lambda: self._profiles()[0].cost
        )
        self._counted = Demand()  # by the meter, at the last sync
        self._sent_before = self._ended_output = 0.0
        self._busy_before = 0.0
        self._charged_s = 0.0
        self.loop.at(SYNC_S, self._sync)

    # ------------------------------------------------------------ requests

    def _route(self, request: Request) -> None:
        if not self._ready(1):
            self._held.append(request)
            return
        before = len(self.tracks)
        super()._route(request)
        track = self.tracks[before]
        if track.end_s is None:
            self._meter.placed(str(request.index), request.prompt_tokens, track.cached)

    def _fleet(self) -> FleetSnapshot:
        ready = [[worker.instance for worker in role if worker.life is Life.READY] for role in self._roles]
        return FleetSnapshot(
            tuple([item.view() for item in ready[0]]),
            tuple([self._decode_view(item) for item in ready[1] if isinstance(item, DecodeInstance)]),
        )

    def _refuse(self, track: Track) -> None:
        super()._refuse(track)
        self._meter.refused(track.request.prompt_tokens, track.cached)

    def _on_end(self, track: Track) -> None:
        super()._on_end(track)
        self._ended_output += track.request.output_tokens
        self._meter.ended(str(track.request.index), track.ttft_s, tpot_s(track))

    # ------------------------------------------------------------ workers

    def _ready(self, role: int) -> int:
        return sum(worker.life is Life.READY for worker in self._roles[role])

    def _desired(self, role: int) -> int:
        return self._there(self._roles[role])

    def _there(self, workers: list[Worker]) -> int:
        return sum(worker.life in (Life.READY, Life.STARTING) for worker in workers)

    def _resize(self, workers: list[Worker], count: int) -> None:
        """Of these workers `count` are to be there. Starting workers go first, then those with least to do."""
        now = self.loop.now
        for _ in range(count - self._there(workers)):
            worker = next(worker for worker in workers if worker.life is Life.OFF)
            worker.life, worker.since_s = Life.STARTING, now
            self.loop.at(now + self.service.start_s, self._up, (worker, now))
        leaving = [worker for worker in workers if worker.life in (Life.STARTING, Life.READY)]
        leaving.sort(key=lambda w: (w.life is Life.READY, self._load(w.instance)))
        for worker in leaving[: max(len(leaving) - count, 0)]:
            worker.life = Life.OFF if worker.life is Life.STARTING else Life.DRAINING

    def _up(self, argument: tuple[Worker, float]) -> None:
        worker, since = argument
        if worker.life is Life.STARTING and worker.since_s == since:
            worker.life = Life.READY
            held, self._held = self._held, []
            for request in held:
                self._route(request)

    def _charge(self) -> None:
        """GPU time of everything that is not off, up to now; a worker that has drained is off from now on."""
        seconds, self._charged_s = self.loop.now - self._charged_s, self.loop.now
        for workers, profiles in zip(self._roles, (self.config.prefill, self.config.decode), strict=True):
            for worker, profile in zip(workers, profiles, strict=True):
                if worker.life is not Life.OFF:
                    self.gpu_hours += profile.gpus * seconds / 3600
                    self.price += profile.price_per_hour * seconds / 3600
                if worker.life is Life.DRAINING and not self._load(worker.instance):
                    worker.life = Life.OFF

    # ------------------------------------------------------------ the controller

    def _sync(self, _: object) -> None:
        self._charge()
        measured = self._measure()
        demand = self._demand()
        counts = self.controller.counts(measured, lambda: self._observe(demand))
        self._follow(counts)
        if self._pending or self._held or self._next_arrival_left():
            self.loop.at(self.loop.now + SYNC_S, self._sync)

    def _follow(self, counts: tuple[int, int]) -> None:
        """Asks for these counts."""
        if counts != (self._desired(0), self._desired(1)):
            self.moves.append((self.loop.now, *counts, self.controller.reason))
        for workers, count in zip(self._roles, counts, strict=True):
            self._resize(workers, count)

    def _demand(self) -> Demand:
        """Tokens sent so far are those of the ended requests and of what decodes now."""
        sent = self._ended_output + sum(item.produced() for item in self.decode)
        new, self._sent_before = max(sent - self._sent_before, 0.0), sent
        total = self._meter.total()
        arrived, self._counted = total.since(self._counted, SYNC_S), total
        return replace(arrived, output_tokens=new)

    def _measure(self) -> Measured:
        views = [[w.instance.view().stats for w in role if w.life is Life.READY] for role in self._roles]
        busy = sum(item.busy_s for item in self.prefill)
        share = (busy - self._busy_before) / SYNC_S / max(len(views[0]), 1)
        self._busy_before = busy
        outstanding = sum(item.queued_requests for item in self.prefill)
        capacity = sum(stats.kv_capacity_tokens for stats in views[1])
        return Measured(
            self.loop.now,
            self._desired(0),
            self._desired(1),
            len(views[0]),
            len(views[1]),
            min(share, 1.0),
            max(outstanding - share * len(views[0]), 0.0),
            outstanding,
            sum(stats.running_requests for stats in views[1]),
            sum(stats.kv_used_tokens for stats in views[1]) / max(capacity, 1),
        )

    def _observe(self, demand: Demand) -> Observation:
        prefill, decode = (self._role(role, profile) for role, profile in enumerate(self._profiles()))
        floors = self.service.floors(self.loop.now)
        return Observation(
            self.loop.now,
            demand,
            prefill,
            decode,
            sum(item.queued_tokens for item in self.prefill),
            sum(item.view().stats.running_requests for item in self.decode),
            len(self._held),
            *floors,
            start_s=self.service.start_s,
        )

    def _profiles(self) -> tuple[Profile, Profile]:
        return self.config.prefill[0], self.config.decode[0]

    def _role(self, role: int, profile: Profile) -> RoleView:
        terminating = sum(worker.life is Life.DRAINING for worker in self._roles[role])
        return RoleView(
            self._desired(role),
            self._ready(role),
            terminating=terminating,
            cost=profile.cost,
            kv_capacity_tokens=profile.kv_capacity_tokens,
            gpus=profile.gpus,
            watts=profile.watts,
        )

    def _load(self, instance: Instance) -> int:
        """Requests it still holds."""
        if isinstance(instance, PrefillInstance):
            return instance.queued_requests
        return self.bound_for[instance.index]


def simulate_scaled(
    service: ScaledService, workload: Workload, controller: Controller, on_progress: Callable[[int], None] | None = None
) -> tuple[Outcome, ScaledCluster]:
    """The whole workload; the cluster tells GPU-hours and moves."""
    cluster = ScaledCluster(service, workload, controller, on_progress)
    outcome = cluster.run()
    return outcome, cluster
