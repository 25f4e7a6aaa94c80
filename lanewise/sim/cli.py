"""`lanewise sim`: what a service would do with a trace, under any policy, against the certificate.

Owns: the command's arguments and output. Must not: hold rules of the simulation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lanewise.errors import ConfigError
from lanewise.policy.batching import POLICY_NAMES, make_batch_policy
from lanewise.policy.cost import CostModel
from lanewise.policy.lanes import LANE_CONTROLLERS
from lanewise.policy.routing import ROUTE_NAMES
from lanewise.sim.bound import Bound, bound
from lanewise.sim.cluster import Outcome, SimConfig, simulate
from lanewise.sim.report import label, plot, summarise, table
from lanewise.sim.scaling_cli import add_scaling, run_scaling
from lanewise.sim.service import Service, load_service
from lanewise.sim.workload import (
    Workload,
    closed_loop,
    jitter,
    one_token,
    poisson,
    read_trace,
    scale_rate,
    select,
)

DEFAULT_BATCH_TOKENS = 8192  # a ceiling: the length-aware policy derives its own, smaller batches from cost and target

EXAMPLE = """example:
  lanewise sim deploy/samples/sim-h200-qwen2.5-32b.yaml --trace trace.csv --rate-scale 0.65 \\
      --policy lanewise --policy fcfs-8192 --bound --json out.json --plot ttft.png"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except ConfigError as error:
        print(f"lanewise sim: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lanewise sim: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lanewise sim",
        description="Simulates a service on a trace with the policies of the real workers.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("service", type=Path, help="LLMService file with a sim profile (see docs/scheduling.md)")
    add("--profile", help="profile to use instead of the file's: YAML mapping or file")
    add("--prefill", type=int, metavar="N", help="prefill instances (default: the file's)")
    add("--decode", type=int, metavar="N", help="decode instances (default: the file's)")
    add_workload(parser)
    add(
        "--policy",
        action="append",
        metavar="NAME",
        help=f"BATCHING[+ROUTING[+LANES]], may be repeated; batching: {', '.join(POLICY_NAMES)} (any budget after the "
        f"dash); routing: {', '.join(ROUTE_NAMES)}; lanes: none, {', '.join(LANE_CONTROLLERS)}",
    )
    add("--max-batch-tokens", type=int, default=DEFAULT_BATCH_TOKENS, metavar="N", help="ceiling where a name has none")
    add("--slo-ttft", type=duration, metavar="D", help="TTFT target, such as 400ms (default: the file's)")
    add("--slo-tpot", type=duration, metavar="D", help="TPOT target; omitted: TTFT alone decides attainment")
    add("--max-queue-wait", type=duration, metavar="D", help="shed above this predicted TTFT (default: shed nothing)")
    add("--bound", action="store_true", help="print the certificates (runs with disaggregation Always, nothing shed)")
    add("--json", type=Path, metavar="FILE", help="write the result, a list for several policies; - is stdout")
    add("--plot", type=Path, metavar="FILE", help="write TTFT distributions as an image")
    add("--quiet", action="store_true", help="no progress bar")
    add_scaling(parser, duration)
    return parser


def add_workload(parser: argparse.ArgumentParser) -> None:
    """The arguments that describe arrivals, shared with `lanewise plan`."""
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="CSV, plain or gzip'ed")
    add("--every", type=int, default=1, metavar="K", help="rows 0, K, 2K … only")
    add("--limit", type=int, metavar="N", help="the first N requests only")
    add("--jitter", type=duration, default=0.0, metavar="D", help="add U(0, D) to arrivals (quantised clocks)")
    add("--rate-scale", type=float, default=1.0, metavar="X", help="arrivals X times as fast")
    add("--poisson", type=float, metavar="RATE", help="Poisson arrivals at RATE per second instead of the trace's")
    add("--concurrency", type=int, metavar="N", help="closed loop of N clients instead of the trace's arrivals")
    add("--one-token", action="store_true", help="outputs of one token: prefill alone")
    add("--cache", metavar="MODE", help="prefix cache per prefill instance: none, ideal, or lru:TOKENS")
    add("--seed", type=int, default=0)


def duration(text: str) -> float:
    """Seconds of `400ms`, `0.4s`, `2m` or a bare number of seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected a duration such as 400ms, got {text!r}")
    return float(found[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0, "": 1.0}[found[2]]


def load_workload(args: argparse.Namespace) -> tuple[Workload, str]:
    """The workload and the cache mode the arguments describe."""
    for name in ("every", "limit", "rate_scale", "poisson", "concurrency"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    workload = select(read_trace(args.trace), every=args.every, limit=args.limit)
    if args.jitter:
        workload = jitter(workload, args.jitter, args.seed)
    workload = scale_rate(workload, args.rate_scale)
    if args.poisson is not None:
        workload = poisson(workload, args.poisson, args.seed)
    if args.concurrency is not None:
        workload = closed_loop(workload, args.concurrency)
    if args.one_token:
        workload = one_token(workload)
    if args.cache is None and workload.has_cache_columns:
        raise ConfigError(f"{args.trace} knows prefix reuse: say --cache ideal, --cache lru:TOKENS or --cache none")
    cache = args.cache or "none"
    if cache not in ("none", "ideal") and not re.fullmatch(r"lru:[1-9]\d*", cache):
        raise ConfigError(f"--cache: expected none, ideal or lru:TOKENS, got {cache!r}")
    return workload, cache


def parse_policy(text: str) -> tuple[str, str, str]:
    """(batching, routing, lanes) of `BATCHING[+ROUTING[+LANES]]`."""
    batching, routing, lanes, *rest = [*text.split("+"), "", ""]
    routing, lanes = routing or "lanewise", lanes or "none"
    try:
        make_batch_policy(batching, max_batch_tokens=512, cost=CostModel())
    except ValueError as error:
        raise ConfigError(f"--policy: {error}") from error
    if routing not in ROUTE_NAMES:
        raise ConfigError(f"--policy: unknown routing {routing!r}; known: {', '.join(ROUTE_NAMES)}")
    if (lanes != "none" and lanes not in LANE_CONTROLLERS) or any(rest):
        raise ConfigError(f"--policy: unknown lanes in {text!r}; known: none, {', '.join(LANE_CONTROLLERS)}")
    return batching, routing, lanes


def _config(args: argparse.Namespace, service: Service, cache: str) -> SimConfig:
    prefill = service.prefill if args.prefill is None else args.prefill
    decode = service.decode if args.decode is None else args.decode
    if prefill < 0 or decode < 1:
        raise ConfigError("expected --prefill of at least 0 and --decode of at least 1")
    mode = service.disaggregation if prefill else "Never"
    if args.bound and (args.max_queue_wait is not None or not prefill):
        raise ConfigError(
            "--bound compares without shedding and with remote prefill: drop --max-queue-wait, set --prefill"
        )
    return SimConfig(
        prefill=(service.prefill_profile,) * prefill,
        decode=(service.decode_profile,) * decode,
        max_batch_tokens=args.max_batch_tokens,
        ttft_target_s=args.slo_ttft or service.ttft_s,
        tpot_target_s=args.slo_tpot or service.tpot_s,
        disaggregation="Always" if args.bound else mode,
        cache=cache,
        max_queue_wait_s=args.max_queue_wait,
        seed=args.seed,
    )


def certificate(config: SimConfig, workload: Workload) -> Bound:
    """The bound for this service: the best prefix hits the cache mode allows, all prefill instances as one."""
    cached = [0 if config.cache == "none" else r.ideal_hit_tokens for r in workload.requests]
    profile = min(config.prefill, key=lambda item: item.cost.token_s)
    return bound(workload.requests, cached, profile.cost, len(config.prefill), config.ttft_target_s)


def _run(args: argparse.Namespace) -> int:
    service = load_service(args.service, args.profile)
    workload, cache = load_workload(args)
    base = _config(args, service, cache)
    names = [parse_policy(text) for text in args.policy or ["lanewise"]]
    if args.pools is not None and args.scaling is None:
        raise ConfigError(
            "--pools: expected --scaling beside it; `lanewise plan --device` compares GPUs for a fixed load"
        )
    if args.scaling is not None:
        batching, routing, _ = names[0]
        return run_scaling(args, service, workload, replace(base, policy=batching, routing=routing))
    limit = certificate(base, workload) if args.bound and workload.concurrency is None else None
    console = Console(stderr=True)
    outcomes: list[tuple[str, Outcome]] = []
    results: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:30}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=args.quiet or not console.is_terminal, transient=True) as bar:
        for batching, routing, lanes in names:
            config = replace(base, policy=batching, routing=routing, lanes=lanes)
            task = bar.add_task(batching, total=len(workload.requests))
            outcome = simulate(config, workload, lambda done, task=task: bar.advance(task, done))  # type: ignore[misc]
            result = summarise(outcome, config.ttft_target_s, args.slo_tpot, limit)
            outcomes.append((label(result), outcome))
            results.append(result)
    if args.json is not None:
        text = json.dumps(results[0] if len(results) == 1 else results, indent=2)
        if str(args.json) == "-":
            print(text)
        else:
            args.json.write_text(text + "\n", encoding="utf-8")
    if args.plot is not None:
        plot(outcomes, base.ttft_target_s, args.plot)
    if str(args.json) != "-":
        out = Console()
        (out if out.is_terminal else Console(width=120)).print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
