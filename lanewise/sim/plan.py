"""`lanewise plan`: the cheapest cluster for a trace and an SLO, and split against mixed at equal cost and power.

Owns: the command's arguments and tables. Must not: search (`search.py`) or simulate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lanewise.errors import ConfigError
from lanewise.policy.profile import Profile, make_profile, shipped_devices
from lanewise.sim.cli import DEFAULT_BATCH_TOKENS, add_workload, duration, load_workload
from lanewise.sim.cluster import SimConfig
from lanewise.sim.search import Candidate, Goal, Searcher, best_at_budget, prefill_share, splits_within
from lanewise.sim.service import load_service

EXAMPLE = """example:
  lanewise plan deploy/samples/sim-h200-qwen2.5-32b.yaml --trace azure_llm_2023_conv.csv --limit 3000 \\
      --slo-ttft 1s --slo-tpot 50ms --attainment 0.95 --device h200 --device h100 --compare 8"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 a cluster was found, 1 none holds the SLO, 2 bad usage."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except ConfigError as error:
        print(f"lanewise plan: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lanewise plan: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lanewise plan",
        description="Finds the cheapest prefill:decode counts and GPU types that hold an SLO on a trace.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("service", type=Path, help="LLMService file with a sim profile")
    add_workload(parser)
    add("--slo-ttft", type=duration, metavar="D", help="default: the file's")
    add("--slo-tpot", type=duration, metavar="D", help="default: the file's")
    add("--attainment", type=float, default=0.95, metavar="X", help="share of requests that must meet both (0.95)")
    add("--device", action="append", metavar="NAME", help=f"GPU types to try: {', '.join(shipped_devices())}")
    add("--policy", default="lanewise", help="batch policy of the split clusters")
    add("--max-instances", type=int, default=16, metavar="N", help="per role")
    add(
        "--compare",
        type=int,
        metavar="N",
        help="also: load held by split and mixed clusters worth N of the file's GPUs",
    )
    add("--json", type=Path, metavar="FILE", help="write everything found; - is stdout")
    return parser


def _profiles(args: argparse.Namespace, base: Profile) -> list[Profile]:
    """The service's own profile, and its model on the other devices that were named."""
    names = args.device or [base.device or "measured"]
    found = []
    for name in names:
        if name == base.device or not base.device:
            found.append(base)
        else:
            found.append(make_profile(base.model, name))
    return found


def _run(args: argparse.Namespace) -> int:
    if not 0 < args.attainment <= 1:
        raise ConfigError(f"--attainment: expected a share such as 0.95, got {args.attainment}")
    service = load_service(args.service)
    workload, cache = load_workload(args)
    goal = Goal(args.slo_ttft or service.ttft_s, args.slo_tpot or service.tpot_s, args.attainment)
    profiles = _profiles(args, service.prefill_profile)
    base = SimConfig((), (), policy=args.policy, max_batch_tokens=DEFAULT_BATCH_TOKENS, cache=cache, seed=args.seed)
    console = Console(stderr=True)
    with console.status("planning") as status:
        searcher = Searcher(workload, goal, base, lambda name: status.update(f"planning: {name}"))
        found = _cheapest(searcher, profiles, args.max_instances)
        compared = _compare(searcher, profiles, args.compare) if args.compare else []
    result: dict[str, Any] = {"goal": {"ttft_s": goal.ttft_s, "tpot_s": goal.tpot_s, "attainment": goal.attainment}}
    result |= {"trace": workload.name, "requests": len(workload.requests), "clusters": found, "compare": compared}
    if args.json is not None:
        text = json.dumps(result, indent=2)
        print(text) if str(args.json) == "-" else args.json.write_text(text + "\n", encoding="utf-8")
    if str(args.json) != "-":
        out = Console()
        out = out if out.is_terminal else Console(width=120)
        out.print(_cheapest_table(found, goal))
        if compared:
            out.print(_compare_table(compared))
    if not found:
        print("lanewise plan: no cluster within --max-instances holds this SLO; long prompts may need", file=sys.stderr)
        print("a higher tensorParallel, a faster GPU or a wider --slo-ttft", file=sys.stderr)
        return 1
    return 0


def _row(candidate: Candidate) -> dict[str, Any]:
    return {
        "cluster": candidate.name,
        "kind": candidate.kind,
        "prefill": len(candidate.prefill),
        "decode": len(candidate.decode),
        "gpus": candidate.gpus,
        "price_per_hour": round(candidate.price_per_hour, 2),
        "watts": candidate.watts,
    }


def _cheapest(searcher: Searcher, profiles: Sequence[Profile], most: int) -> list[dict[str, Any]]:
    """Every pair of GPU types, split, and every type mixed; cheapest first."""
    candidates = [searcher.cheapest_split(p, d, most) for p in profiles for d in profiles]
    candidates += [searcher.cheapest_mixed(profile, most) for profile in profiles]
    rows = []
    for candidate in candidates:
        if candidate is not None:
            summary = searcher.measure(candidate)
            rows.append(_row(candidate) | {name: summary[name] for name in ("slo_attainment", "ttft_ms", "tpot_ms")})
    return sorted(rows, key=lambda row: (row["price_per_hour"], row["watts"]))


def _compare(searcher: Searcher, profiles: Sequence[Profile], gpus: int) -> list[dict[str, Any]]:
    """Load that split and mixed clusters hold at the cost, and at the power, of `gpus` workers of the first type."""
    reference = Candidate((), (profiles[0],) * gpus)
    mixed = searcher.most_load(reference, _ceiling(searcher, reference))
    rows = [_row(reference) | {"equal": "reference", "load": mixed, "ratio": 1.0}]
    measures: tuple[tuple[str, Callable[[Candidate], float]], ...] = (
        ("cost", lambda candidate: candidate.price_per_hour),
        ("power", lambda candidate: candidate.watts),
    )
    for equal, measure in measures:
        for prefill in profiles:
            for decode in profiles:
                share = prefill_share(searcher.workload, prefill, decode)
                candidates = splits_within(prefill, decode, measure(reference), measure, share)
                best = best_at_budget(searcher, candidates, _ceiling(searcher, reference), tried=3)
                if best is not None:
                    ratio = round(best[1] / mixed, 3) if mixed else None
                    rows.append(_row(best[0]) | {"equal": equal, "load": best[1], "ratio": ratio})
    return rows


def _ceiling(searcher: Searcher, reference: Candidate) -> float:
    """A rate factor no cluster of this size can hold: all its time spent on prefill compute alone."""
    workload = searcher.workload
    profile = reference.decode[0]
    work = sum(profile.cost.work(r.prompt_tokens, 0) for r in workload.requests)
    span = max(workload.requests[-1].arrival_s - workload.requests[0].arrival_s, 1e-9)
    return 1.5 * len(reference.decode) * span / work


def _cheapest_table(rows: Sequence[dict[str, Any]], goal: Goal) -> Table:
    title = f"cheapest clusters: TTFT ≤ {goal.ttft_s:g} s and TPOT ≤ {goal.tpot_s:g} s for {100 * goal.attainment:g} %"
    view = Table(title=title, title_justify="left", box=SIMPLE)
    view.add_column("cluster", no_wrap=True)
    for name in ("GPUs", "$/h", "kW", "on time", "TTFT p50 ms", "TPOT p50 ms"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        view.add_row(
            row["cluster"],
            str(row["gpus"]),
            f"{row['price_per_hour']:.1f}",
            f"{row['watts'] / 1e3:.1f}",
            f"{100 * row['slo_attainment']:.1f} %",
            f"{row['ttft_ms']['p50']:.0f}",
            f"{row['tpot_ms']['p50']:.1f}" if row["tpot_ms"] else "–",
        )
    return view


def _compare_table(rows: Sequence[dict[str, Any]]) -> Table:
    view = Table(title="load held at the same SLO (× the trace's rate)", title_justify="left", box=SIMPLE)
    view.add_column("equal", no_wrap=True)
    view.add_column("cluster", no_wrap=True)
    for name in ("$/h", "kW", "load ×", "against mixed ×"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        price, watts = f"{row['price_per_hour']:.1f}", f"{row['watts'] / 1e3:.1f}"
        view.add_row(row["equal"], row["cluster"], price, watts, f"{row['load']:.2f}", ratio)
    return view


if __name__ == "__main__":
    sys.exit(main())
