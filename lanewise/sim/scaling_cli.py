"""`lanewise sim --scaling policy.yaml`: a trace, or a day drawn from it, with counts that a ScalingPolicy sets.

Owns: the arguments of scaling and what is printed. Must not: simulate or decide.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lanewise.errors import ConfigError
from lanewise.policy.scaling_types import Rules
from lanewise.scaling_rules import floors_at, rules_of
from lanewise.sim.cluster import Outcome, SimConfig
from lanewise.sim.report import summarise
from lanewise.sim.scaling_cluster import Floors, ScaledCluster, ScaledService, simulate_scaled
from lanewise.sim.scaling_controllers import SYNC_S, Policy
from lanewise.sim.scaling_day import Day, arrivals, mix_of
from lanewise.sim.scaling_pooled import PooledCluster, PooledService, read_pools
from lanewise.sim.service import Service
from lanewise.sim.workload import Workload
from lanewise.spec_scaling import ScalingPolicy
from lanewise.spec_yaml import read_resources

MIDNIGHT = datetime(2026, 1, 5, tzinfo=UTC)  # a Monday: simulated second 0, for cron schedules
PEAK_TO_TROUGH = 4.0


def add_scaling(parser: argparse.ArgumentParser, duration: Any) -> None:
    """The arguments."""
    add = parser.add_argument
    add("--scaling", type=Path, metavar="FILE", help="a ScalingPolicy sets the counts; prints GPU-hours and every move")
    add(
        "--day", type=float, metavar="RATE", help="with --scaling: draw the trace again for a 24 h sine, RATE/s at peak"
    )
    add("--pools", type=Path, metavar="FILE", help="with --scaling: workers of several GPUs, by the cheapest mix")
    add("--pod-start", type=duration, default=60.0, metavar="D", help="with --scaling: a pod's start-up time (60s)")


def read_policy(path: Path) -> ScalingPolicy:
    """The one ScalingPolicy of a file; other documents in it are checked and passed over."""
    found = [item for item in read_resources(path) if isinstance(item, ScalingPolicy)]
    if len(found) != 1:
        raise ConfigError(f"{path}: expected one document of kind ScalingPolicy, got {len(found)}")
    return found[0]


def run_scaling(args: argparse.Namespace, service: Service, workload: Workload, config: SimConfig) -> int:
    """`config` gives policies and targets; the counts come from the ScalingPolicy."""
    spec = read_policy(args.scaling).spec
    if spec.prefill.max < 1:
        raise ConfigError(f"{args.scaling}: spec.prefill.max: expected at least 1, the simulator scales both roles")
    if args.day is not None:
        if args.day <= 0:
            raise ConfigError(f"--day: expected more than 0 requests a second, got {args.day}")
        mix = mix_of(workload, service.prefill_profile.cost, config.ttft_target_s, config.cache != "none")
        workload = arrivals(Day(args.day, args.day / PEAK_TO_TROUGH), mix, args.seed)
    tpot_s = args.slo_tpot or service.tpot_s
    rules = rules_of(spec, config.ttft_target_s, tpot_s, SYNC_S)

    def floors(at_s: float) -> tuple[int, int, str]:
        return floors_at(spec, MIDNIGHT + timedelta(seconds=at_s))

    outcome, cluster = _simulate(args, service, workload, replace(config, tpot_target_s=tpot_s), rules, floors)
    summary = summarise(outcome, config.ttft_target_s, tpot_s, None)
    result = {
        "trace": workload.name,
        "requests": summary["requests"],
        "gpu_hours": round(cluster.gpu_hours, 3),
        "price": round(cluster.price, 2),
        "slo_attainment": summary["slo_attainment"],
        "ttft_ms": summary["ttft_ms"],
        "tpot_ms": summary["tpot_ms"],
        "moves": [{"at_s": at, "prefill": p, "decode": d, "reason": why} for at, p, d, why in cluster.moves],
    }
    _show(args, result)
    return 0


def _simulate(
    args: argparse.Namespace, service: Service, workload: Workload, config: SimConfig, rules: Rules, floors: Floors
) -> tuple[Outcome, ScaledCluster]:
    first = max(rules.prefill_min, 1), rules.decode_min
    if args.pools is None:
        most = replace(
            config,
            prefill=(service.prefill_profile,) * rules.prefill_max,
            decode=(service.decode_profile,) * rules.decode_max,
        )
        return simulate_scaled(ScaledService(most, first, args.pod_start, floors), workload, Policy(rules))
    own = service.prefill_profile
    if service.decode_profile != own:
        raise ConfigError("--pools: expected a service with one profile for both roles, to count workers in")
    pools = read_pools(args.pools, own)
    pooled = PooledService(config, own, pools, first, args.pod_start, floors, rules.gpus, rules.watts)
    cluster = PooledCluster(pooled, workload, Policy(replace(rules, gpus=None, watts=None)))
    return cluster.run(), cluster


def _show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json is not None:
        text = json.dumps(result, indent=2, ensure_ascii=False)
        if str(args.json) == "-":
            print(text)
            return
        args.json.write_text(text + "\n", encoding="utf-8")
    out = Console()
    out = out if out.is_terminal else Console(width=160)
    share = 100 * (result["slo_attainment"] or 0)
    title = (
        f"{result['trace']}: {result['requests']} requests, {result['gpu_hours']:.1f} GPU-hours "
        f"({result['price']:.2f} at the profiles' prices), {share:.1f} % on time"
    )
    view = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("at", "prefill", "decode", "why"):
        view.add_column(name)
    for move in result["moves"]:
        at = str(timedelta(seconds=round(move["at_s"])))
        view.add_row(at, str(move["prefill"]), str(move["decode"]), move["reason"])
    out.print(view)
