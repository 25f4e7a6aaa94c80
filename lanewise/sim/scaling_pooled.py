"""The event simulator with workers of several kinds: the policy counts, the cheapest mix of the pools serves.

Owns: simulated workers by pool, and how one mix is left for the next. Must not: choose a mix (`policy.scaling_pools`).

A ScalingPolicy decides in workers of the service's own profile, minimums, maximums and ratio included; both budgets
hold for the mix. Workers of a role go only when none of that role starts any more, so that others have taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lanewise.errors import ConfigError
from lanewise.policy.profile import Profile, parse_profile
from lanewise.policy.scaling_capacity import prefill_work
from lanewise.policy.scaling_need import correction_of, decode_load, recent
from lanewise.policy.scaling_pools import Ask, Load, Mix, Pool, Worth, cheapest, worth
from lanewise.policy.scaling_types import Demand, RoleView
from lanewise.sim.cluster import SimConfig
from lanewise.sim.scaling_cluster import Floors, Life, ScaledCluster, ScaledService, Worker
from lanewise.sim.scaling_controllers import Policy
from lanewise.sim.scaling_day import mix_of, sums
from lanewise.sim.service import load_profile
from lanewise.sim.workload import Workload

SHAPE_S = 480.0  # of demand whose lengths compare the pools
PATIENCE = 0.05  # of the price: what a mix may cost above the cheapest to spare swaps
FIELDS = {"name", "profile", "most"}


@dataclass(frozen=True, slots=True)
class PooledService:
    """`config` gives policies and targets, `own` is the profile in whose workers the policy counts."""

    config: SimConfig
    own: Profile
    pools: tuple[tuple[Pool, Profile], ...]
    first: tuple[int, int]  # of the service's own workers; the mix for them is up at the start
    start_s: float
    floors: Floors
    gpus: int | None = None
    watts: float | None = None


def read_pools(path: Path, own: Profile) -> tuple[tuple[Pool, Profile], ...]:
    """The file of `--pools`: `pools: [{name, profile: {model, device, …} or a file, most}]`. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict) or set(data) != {"pools"} or not isinstance(data["pools"], list) or not data["pools"]:
        raise ConfigError(f"{path}: expected a mapping with one list 'pools' of {{name, profile, most}}")
    found = tuple(_pool(entry, f"{path}: pools[{index}]", path.parent) for index, entry in enumerate(data["pools"]))
    names = [pool.name for pool, _ in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: expected every pool to have a name of its own, got {', '.join(names)}")
    for pool, profile in found:
        if profile.kv_bytes_per_token != own.kv_bytes_per_token:
            raise ConfigError(
                f"{path}: pool {pool.name}: expected the service's model ({own.kv_bytes_per_token} bytes of KV a token)"
                f", got {profile.kv_bytes_per_token}"
            )
    return found


def _pool(entry: Any, where: str, folder: Path) -> tuple[Pool, Profile]:
    if not isinstance(entry, Mapping) or set(entry) != FIELDS:
        raise ConfigError(f"{where}: expected the fields {', '.join(sorted(FIELDS))}, got {entry!r}")
    most, data = entry["most"], entry["profile"]
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ConfigError(f"{where}.most: expected a whole number of at least 1, got {most!r}")
    if not isinstance(data, Mapping | str):
        raise ConfigError(f"{where}.profile: expected a mapping such as {{model: qwen2.5-32b, device: h200}} or a file")
    profile = load_profile(data, folder) if isinstance(data, str) else parse_profile(data, f"{where}.profile")
    if profile.price_per_hour <= 0:
        raise ConfigError(f"{where}.profile: expected a price_per_hour above 0, got {profile.price_per_hour:g}")
    return pool_of(str(entry["name"]), profile, most), profile


def pool_of(name: str, profile: Profile, most: int) -> Pool:
    """A pool of workers of this profile."""
    return Pool(
        name, profile.cost, profile.kv_capacity_tokens, profile.price_per_hour, most, profile.gpus, profile.watts
    )


class PooledCluster(ScaledCluster):
    """`run()` as ever; afterwards `gpu_hours`, `price` and `moves`, whose reasons begin with the mix."""

    def __init__(self, service: PooledService, workload: Workload, controller: Policy) -> None:
        self._pooled, self._policy = service, controller
        self._pools = [pool for pool, _ in service.pools]
        self._own = pool_of("own", service.own, 1)
        self._asked = service.first
        workers = tuple(profile for pool, profile in service.pools for _ in range(pool.most))
        config = service.config
        config = SimConfig(
            workers,
            workers,
            policy=config.policy,
            routing=config.routing,
            max_batch_tokens=config.max_batch_tokens,
            ttft_target_s=config.ttft_target_s,
            tpot_target_s=config.tpot_target_s,
            cache=config.cache,
            seed=config.seed,
        )
        super().__init__(ScaledService(config, (0, 0), service.start_s, service.floors), workload, controller)
        self._value = self._worth(_shape_of(workload, service.own, config))
        none = Mix((0,) * len(self._pools), (0,) * len(self._pools))
        self._target = cheapest(self._pools, self._value, Ask(*self._asked, service.gpus, service.watts, none)).mix
        for role, counts in enumerate((self._target.prefill, self._target.decode)):
            for pool, count in enumerate(counts):
                for worker in self._group(role, pool)[:count]:
                    worker.life = Life.READY
        self.moves = [(0.0, sum(self._target.prefill), sum(self._target.decode), f"{self._words()}: start")]

    # ------------------------------------------------------------ what the policy sees: workers of the own profile

    def _desired(self, role: int) -> int:
        return self._asked[role]

    def _profiles(self) -> tuple[Profile, Profile]:
        return self._pooled.own, self._pooled.own

    def _role(self, role: int, profile: Profile) -> RoleView:
        asked, wanted = self._asked[role], self._worth_of(self._target, role)
        share = self._worth_of(self._mix(Life.READY), role) / wanted if wanted > 0 else 0.0
        ready = int(asked * min(share, 1.0) + 1e-9)
        return RoleView(asked, ready, cost=profile.cost, kv_capacity_tokens=profile.kv_capacity_tokens)

    # ------------------------------------------------------------ from mix to mix

    def _follow(self, counts: tuple[int, int]) -> None:
        """A new mix where the policy asks for other counts, or where the lengths have changed and it is too small."""
        state = self._policy.state
        if state.bins:
            self._value = self._worth(recent(state.bins, SHAPE_S))
        short = any(self._worth_of(self._target, role) < counts[role] * (1 - PATIENCE) for role in (0, 1))
        if counts != self._asked or short:
            self._asked = counts
            there, leaving = self._mix(Life.STARTING, Life.READY), self._mix(Life.DRAINING)
            ask = Ask(*counts, self._pooled.gpus, self._pooled.watts, there, leaving)
            choice = cheapest(self._pools, self._value, ask, PATIENCE)
            if choice.mix != self._target:
                self._target = choice.mix
                short_of = f", {100 * choice.share:.0f} % of what is needed" if choice.share < 1 else ""
                reason = f"{self._words()}{short_of}: {self.controller.reason}"
                self.moves.append((self.loop.now, sum(choice.mix.prefill), sum(choice.mix.decode), reason))
        for role, wanted in enumerate((self._target.prefill, self._target.decode)):
            groups = [self._group(role, pool) for pool in range(len(self._pools))]
            for group, count in zip(groups, wanted, strict=True):
                self._resize(group, max(count, self._there(group)))
            if not any(worker.life is Life.STARTING for group in groups for worker in group):
                for group, count in zip(groups, wanted, strict=True):
                    self._resize(group, count)

    def _worth(self, shape: Demand) -> Worth:
        config, rules = self.config, self._policy.rules
        costs = [*(pool.cost for pool in self._pools), self._own.cost]
        load = Load(
            tuple(prefill_work(cost, config.ttft_target_s, shape) for cost in costs),
            decode_load(shape, 0.0),
            config.ttft_target_s,
            config.tpot_target_s,
            rules.late_share,
            correction_of(self._policy.state),
        )
        return worth(self._pools, self._own, load, *self._asked)

    def _worth_of(self, mix: Mix, role: int) -> float:
        counts = (mix.prefill, mix.decode)[role]
        return sum(value[role] * count for value, count in zip(self._value, counts, strict=True))

    def _group(self, role: int, pool: int) -> list[Worker]:
        first = sum(item.most for item in self._pools[:pool])
        return self._roles[role][first : first + self._pools[pool].most]

    def _mix(self, *lives: Life) -> Mix:
        counts = [
            tuple(sum(worker.life in lives for worker in self._group(role, pool)) for pool in range(len(self._pools)))
            for role in (0, 1)
        ]
        return Mix(*counts)

    def _words(self) -> str:
        both = []
        for name, counts in (("prefill", self._target.prefill), ("decode", self._target.decode)):
            used = [f"{count}×{pool.name}" for pool, count in zip(self._pools, counts, strict=True) if count]
            both.append(f"{name} {' + '.join(used) or 'none'}")
        return ", ".join(both)


def _shape_of(workload: Workload, own: Profile, config: SimConfig) -> Demand:
    """The lengths of the whole workload: what the first mix is chosen for."""
    mix = mix_of(workload, own.cost, config.ttft_target_s, config.cache != "none")
    return sums(mix.shapes, 1.0)
