"""A simulated service: router, prefill and decode instances, KV links, driven by the real policies.

Owns: the path of one request through the parts and what is recorded of it. Must not: decide; `lanewise.policy` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lanewise.fleet import FleetSnapshot, Lane
from lanewise.policy.admission import admit
from lanewise.policy.baseline_routing import LengthBuckets
from lanewise.policy.batching import make_batch_policy
from lanewise.policy.lanes import LANE_CONTROLLERS, PERIOD_S
from lanewise.policy.profile import Profile
from lanewise.policy.routing import RouteRequest, choose_pair
from lanewise.sim.decode import DecodeInstance
from lanewise.sim.loop import Loop
from lanewise.sim.prefill import PrefillInstance, Track
from lanewise.sim.workload import BLOCK_TOKENS, Request, Workload


@dataclass(frozen=True, slots=True)
class SimConfig:
    """One service to simulate."""

    prefill: tuple[Profile, ...]  # one entry per instance
    decode: tuple[Profile, ...]
    policy: str = "lanewise"  # of the batches
    routing: str = "lanewise"
    lanes: str = "none"
    max_batch_tokens: int = 512
    ttft_target_s: float = 0.4
    tpot_target_s: float = 0.05
    disaggregation: Literal["Auto", "Always", "Never"] = "Always"
    cache: str = "none"  # none | ideal | lru:TOKENS, per prefill instance
    max_queue_wait_s: float | None = None  # None: admission off
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """What one run measured."""

    config: SimConfig
    workload: Workload
    tracks: list[Track]
    shed: int
    makespan_s: float
    prefill_busy_s: list[float] = field(default_factory=list)
    decode_busy_s: list[float] = field(default_factory=list)
    batches: int = 0
    preemptions: int = 0
    lane_moves: int = 0


class Cluster:
    """Runs one workload on one service."""

    def __init__(self, config: SimConfig, workload: Workload, on_progress: Callable[[int], None] | None = None) -> None:
        if not config.decode:
            raise ValueError("a service needs at least one decode worker")
        self.config, self.workload = config, workload
        self.loop = Loop()
        self.tracks: list[Track] = []
        self.shed = 0
        self._on_progress = on_progress
        self._buckets = LengthBuckets() if config.routing == "buckets" else None
        self._link_free_s = [0.0] * len(config.decode)
        mode, _, tokens = config.cache.partition(":")
        blocks = int(tokens) // BLOCK_TOKENS if mode == "lru" else 0
        self.prefill = [
            PrefillInstance(
                i,
                self.loop,
                make_batch_policy(config.policy, max_batch_tokens=config.max_batch_tokens, cost=profile.cost),
                profile,
                blocks,
                self._on_chunk,
                "sim",
            )
            for i, profile in enumerate(config.prefill)
        ]
        self.decode = [
            DecodeInstance(
                i,
                self.loop,
                make_batch_policy(config.policy, max_batch_tokens=config.max_batch_tokens, cost=profile.cost),
                profile,
                self._on_local_first,
                self._on_end,
                "sim",
            )
            for i, profile in enumerate(config.decode)
        ]
        self._prefill_index = {item.view().identity.incarnation: item for item in self.prefill}
        self._decode_index = {item.view().identity.incarnation: item for item in self.decode}
        self._lanes = LANE_CONTROLLERS[config.lanes](config.ttft_target_s) if config.lanes != "none" else None
        self._pending = 0
        self._next = 0

    def run(self) -> Outcome:
        """To the end of the last request."""
        requests = self.workload.requests
        if self.workload.concurrency is not None:
            for _ in range(min(self.workload.concurrency, len(requests))):
                self._send_next()
        elif requests:
            self.loop.at(requests[0].arrival_s, self._arrive, 0)
        if self._lanes is not None:
            for instance, lane in zip(self.prefill, self._lanes.start(len(self.prefill)), strict=True):
                instance.set_lane(lane)
            self.loop.at(PERIOD_S, self._move_lanes)
        self.loop.run()
        unfinished = [t for t in self.tracks if t.end_s is None]
        assert not unfinished, f"{len(unfinished)} requests never ended"
        return Outcome(
            self.config,
            self.workload,
            self.tracks,
            self.shed,
            self.loop.now,
            [item.busy_s for item in self.prefill],
            [item.busy_s for item in self.decode],
            sum(item.batches for item in self.prefill),
            sum(item.preemptions for item in self.decode),
            self._lanes.moves if self._lanes is not None else 0,
        )

    def _arrive(self, index: int) -> None:
        requests = self.workload.requests
        if index + 1 < len(requests):
            self.loop.at(requests[index + 1].arrival_s, self._arrive, index + 1)
        self._route(requests[index])

    def _send_next(self) -> None:
        if self._next < len(self.workload.requests):
            self._next += 1
            self._route(self.workload.requests[self._next - 1])

    def _route(self, request: Request) -> None:
        config, now = self.config, self.loop.now
        cached = self._cached(request)
        fleet = self._fleet()
        cuts: tuple[int, ...] = ()
        if self._buckets is not None:
            uncached = request.prompt_tokens - max(cached.values(), default=0)
            cuts = self._buckets.observe(uncached, len(self.prefill), now)
        ask = RouteRequest(
            request.prompt_tokens,
            cached,
            config.ttft_target_s,
            config.disaggregation,
            config.tpot_target_s,
            request.output_tokens,
            length_cuts=cuts,
            lane=self._lane_of(request, cached),
        )
        number = len(self.tracks)
        pair = choose_pair(ask, fleet, now, config.seed + number, config.routing)
        assert pair is not None  # every instance is always ready
        track = Track(request, now, decode=self._decode_index[pair.decode].index)
        track.cached = cached.get(pair.prefill, 0) if pair.prefill is not None else 0
        self.tracks.append(track)
        self._pending += 1
        if config.max_queue_wait_s is not None:
            retry = admit(pair.predicted_ttft_s, float("inf"), config.max_queue_wait_s)
            if retry is not None:
                self._refuse(track)
                return
        if pair.prefill is None:
            self.decode[track.decode].submit_local(track, config.ttft_target_s)
            return
        instance = self._prefill_index[pair.prefill]
        track.prefill = instance.index
        instance.submit(track, config.ttft_target_s)

    def _fleet(self) -> FleetSnapshot:
        """What the router may choose from."""
        return FleetSnapshot(
            tuple([item.view() for item in self.prefill]), tuple([item.view() for item in self.decode])
        )

    def _lane_of(self, request: Request, cached: dict[str, int]) -> Lane:
        if self._lanes is None or len(self.prefill) < 2:
            return Lane.ANY
        return self._lanes.lane_of(request.prompt_tokens - max(cached.values(), default=0), request.prompt_tokens)

    def _cached(self, request: Request) -> dict[str, int]:
        """Prefix hit by instance; at least one token is always computed."""
        if self.config.cache == "none":
            return {}
        most = request.prompt_tokens - 1
        if self.config.cache == "ideal":
            return {name: min(request.ideal_hit_tokens, most) for name in self._prefill_index}
        blocks = list(request.blocks())
        return {name: min(item.cache.match(blocks), most) for name, item in self._prefill_index.items()}

    def _on_chunk(self, track: Track, new: int, done: bool) -> None:
        """A chunk of a remote prefill ended: its KV travels; at the last one the first token is out."""
        now, request = self.loop.now, track.request
        if request.output_tokens > 1:
            profile = self.config.decode[track.decode]
            if not track.link_end_s:
                new += track.cached  # decode caches are cold here, so the cached prefix travels with the first chunk
            seconds = new * profile.kv_bytes_per_token * 8 / (profile.kv_link_gbps * 1e9)
            track.link_end_s = max(self._link_free_s[track.decode], now) + seconds
            self._link_free_s[track.decode] = track.link_end_s
        if not done:
            return
        track.ttft_s = now - track.arrival_s
        track.received = 1
        if request.output_tokens == 1:
            self._on_end(track)
            return
        latency = self.config.decode[track.decode].kv_link_latency_us * 1e-6
        self.loop.at(max(now, track.link_end_s) + latency, self._deliver, track)

    def _deliver(self, track: Track) -> None:
        self.decode[track.decode].deliver(track)

    def _on_local_first(self, track: Track) -> None:
        """A local prefill gave its first token; nothing travels."""

    def _refuse(self, track: Track) -> None:
        """Sent away: no worker hears of it."""
        self.shed += 1
        self._close(track)

    def _on_end(self, track: Track) -> None:
        """Its last token is out."""
        self._close(track)

    def _close(self, track: Track) -> None:
        track.end_s = self.loop.now
        self._pending -= 1
        if self._on_progress is not None:
            self._on_progress(1)
        if self.workload.concurrency is not None:
            self._send_next()

    def _move_lanes(self, _: object) -> None:
        assert self._lanes is not None
        move = self._lanes.propose([item.view() for item in self.prefill])
        if move is not None:
            self._prefill_index[move.incarnation].set_lane(move.to)
        if self._pending or self._next_arrival_left():
            self.loop.at(self.loop.now + PERIOD_S, self._move_lanes)

    def _next_arrival_left(self) -> bool:
        return len(self.tracks) < len(self.workload.requests)


def simulate(config: SimConfig, workload: Workload, on_progress: Callable[[int], None] | None = None) -> Outcome:
    """Runs the workload to its end."""
    return Cluster(config, workload, on_progress).run()
