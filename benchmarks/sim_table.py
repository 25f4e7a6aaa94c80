"""The scheduling tables of docs/scheduling.md: every policy on every trace, against the certificate.

Owns: which traces, policies and settings make the tables, and how they are printed.
Must not: hold a policy or a definition; `lanewise.sim` does.

    python benchmarks/sim_table.py [one] [eight] [closed] [capacity] [speed]     (all of them without arguments)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lanewise.sim.cli import DEFAULT_BATCH_TOKENS, certificate, parse_policy
from lanewise.sim.cluster import SimConfig, simulate
from lanewise.sim.report import summarise
from lanewise.sim.service import load_service
from lanewise.sim.workload import Workload, closed_loop, jitter, one_token, read_trace, scale_rate, select

HERE = Path(__file__).parent
DATA = HERE / "data"
SERVICE = HERE.parent / "deploy" / "samples" / "sim-h200-qwen2.5-32b.yaml"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One line of a table: a workload by seed, and what must be reached (mean ms, attained %, worst s)."""

    name: str
    load: Callable[[int], Workload]
    seeds: tuple[int, ...] = (0,)
    cache: str = "none"
    mean_ms: float = float("inf")
    attained: float = 0.0
    worst_s: float = float("inf")


def _azure(scale: float, limit: int) -> Workload:
    return scale_rate(select(read_trace(DATA / "azure_llm_2023_conv.csv.gz"), limit=limit), scale)


def _azure_at(rate: float, limit: int) -> Workload:
    workload = _azure(1.0, limit)
    return scale_rate(workload, rate / (limit / workload.requests[-1].arrival_s))


def _mooncake(seed: int) -> Workload:
    trace = select(read_trace(DATA / "mooncake_conversation.csv.gz"), every=8)
    return scale_rate(jitter(trace, 3.0, seed), 0.95)


def _synthetic(name: str) -> Callable[[int], Workload]:
    return lambda seed: read_trace(DATA / f"{name}_s{seed}.csv.gz")


ONE = (
    Row("azure conv ×0.65, 12,000", lambda _: _azure(0.65, 12000), attained=83.8, worst_s=13),
    Row("lmsys 60/s", _synthetic("lmsys_60"), SEEDS, mean_ms=55, attained=99.6),
    Row("lmsys 100/s", _synthetic("lmsys_100"), SEEDS, mean_ms=100, attained=99.1, worst_s=8),
    Row("bimodal 14/s", _synthetic("bimodal_14"), SEEDS, mean_ms=215, attained=91.6, worst_s=13),
    Row("mooncake conv /8 ×0.95", _mooncake, SEEDS, "ideal", attained=49, worst_s=67),
)
ONE_POLICIES = (
    "fcfs-8192",
    "fcfs-1024",
    "spf-8192",
    "srpt-512",
    "srpt-1024",
    "laps-8192",
    "laps-adaptive-8192",
    "lanewise",
)
EIGHT = (
    Row("azure conv 47.5/s, 8,000", lambda _: _azure_at(47.5, 8000), attained=87, worst_s=12),
    Row("mix 145/s", _synthetic("mix_145"), SEEDS, attained=96, worst_s=4.5),
    Row("lmsys 740/s", _synthetic("lmsys_740"), SEEDS, mean_ms=52, attained=99.7),
)
EIGHT_POLICIES = (
    "laps-8192+random+laps-pools",
    "fcfs-8192+round-robin",
    "fcfs-8192+power-of-two",
    "fcfs-8192+least-work",
    "fcfs-8192+buckets",
    "srpt-512+least-work",
    "lanewise+least-work",
    "lanewise+lanewise+learned",
    "lanewise",
)


def config_for(policy: str, instances: int, cache: str = "none") -> SimConfig:
    """The service of the sample file with this policy."""
    service = load_service(SERVICE)
    batching, routing, lanes = parse_policy(policy)
    return SimConfig(
        (service.prefill_profile,) * instances,
        (service.decode_profile,),
        policy=batching,
        routing=routing,
        lanes=lanes,
        max_batch_tokens=DEFAULT_BATCH_TOKENS,
        ttft_target_s=service.ttft_s,
        tpot_target_s=service.tpot_s,
        disaggregation="Always",
        cache=cache,
    )


def measure(policy: str, row: Row, instances: int) -> tuple[float, float, float]:
    """Median over the seeds of (mean ms, attained %, worst s)."""
    found = []
    for seed in row.seeds:
        result = _summary(config_for(policy, instances, row.cache), one_token(row.load(seed)))
        found.append((result["ttft_ms"]["mean"], 100 * result["slo_attainment"], result["ttft_ms"]["max"] / 1e3))
    return tuple(median(values) for values in zip(*found, strict=True))  # type: ignore[return-value]


def _summary(config: SimConfig, workload: Workload) -> dict[str, Any]:
    return summarise(simulate(config, workload), config.ttft_target_s, None, None)


def _bound(row: Row, instances: int) -> str:
    limits = [certificate(config_for("lanewise", instances, row.cache), row.load(seed)) for seed in row.seeds]
    mean, attained = median(b.mean_ttft_s for b in limits), median(b.attainment for b in limits)
    return f"{mean * 1e3:.0f} / {100 * attained:.1f}"


def comparison(title: str, rows: Sequence[Row], policies: Sequence[str], instances: int) -> bool:
    """Prints one table; whether our policy reaches every target in it."""
    view = Table(title=f"{title}: mean ms / attained % / worst s", title_justify="left", box=SIMPLE)
    view.add_column("policy", no_wrap=True)
    for row in rows:
        view.add_column(row.name, justify="right", no_wrap=True)
    view.add_row("certified bound", *(_bound(row, instances) for row in rows))
    reached = True
    for policy in policies:
        cells = []
        for row in rows:
            mean, attained, worst = measure(policy, row, instances)
            cell = f"{mean:.0f} / {attained:.1f} / {worst:.1f}"
            if policy == "lanewise":
                marks = (mean <= row.mean_ms, attained >= row.attained, worst <= row.worst_s)
                cell = f"{mean:.1f} / {attained:.2f} / {worst:.1f}" + ("" if all(marks) else " ✗")
                reached = reached and all(marks)
            cells.append(cell)
        view.add_row(policy, *cells)
    view.add_row("must reach", *(_target(row) for row in rows))
    _console().print(view)
    return reached


def _target(row: Row) -> str:
    parts = [f"≥ {row.attained:g} %"]
    if row.mean_ms < float("inf"):
        parts.append(f"mean ≤ {row.mean_ms:g}")
    if row.worst_s < float("inf"):
        parts.append(f"worst ≤ {row.worst_s:g}")
    return ", ".join(parts)


def closed() -> bool:
    """Closed loop on lmsys lengths, cold caches: never worse than the better of two plain queues."""
    lengths = one_token(read_trace(DATA / "lmsys10k_lengths.csv.gz"))
    view = Table(title="closed loop, lmsys lengths: requests/s (median TTFT ms)", title_justify="left", box=SIMPLE)
    policies = ("fcfs-8192", "fcfs-1024", "laps-8192", "lanewise")
    for name in ("clients", *policies, "rate ×", "median ×"):
        view.add_column(name, justify="right", no_wrap=True)
    reached = True
    for clients in (1, 2, 4, 8, 16, 32, 64, 128):
        workload = closed_loop(replace(lengths, requests=lengths.requests[: 1500 + 50 * clients]), clients)
        found = {policy: _summary(config_for(policy, 1), workload) for policy in policies}
        rate = {policy: result["throughput_rps"] for policy, result in found.items()}
        middle = {policy: result["ttft_ms"]["p50"] for policy, result in found.items()}
        faster = rate["lanewise"] / max(rate["fcfs-8192"], rate["fcfs-1024"])
        sooner = min(middle["fcfs-8192"], middle["fcfs-1024"]) / middle["lanewise"]
        reached = reached and faster >= 0.98 and sooner >= 0.98
        cells = [f"{rate[policy]:.1f} ({middle[policy]:.0f})" for policy in policies]
        view.add_row(str(clients), *cells, f"{faster:.3f}", f"{sooner:.3f}")
    _console().print(view)
    return reached


def capacity() -> bool:
    """Load of the mix held at 95 % attainment on eight instances."""
    workload = one_token(read_trace(DATA / "mix_145_s0.csv.gz"))

    def held(policy: str) -> float:
        low, high = 0.0, 2.0
        for _ in range(7):
            middle = (low + high) / 2
            good = _summary(config_for(policy, 8), scale_rate(workload, middle))["slo_attainment"] >= 0.95
            low, high = (middle, high) if good else (low, middle)
        return low

    loads = {policy: held(policy) for policy in ("laps-8192+random+laps-pools", "fcfs-8192+buckets", "lanewise")}
    ours = loads["lanewise"]
    for policy, load in loads.items():
        print(f"mix held at 95 %: {policy:30} {145 * load:6.1f} requests/s, ours is {ours / load:.2f} × that")
    published, buckets, _ = loads.values()
    return ours >= 1.25 * buckets and ours >= 1.8 * published


def speed() -> bool:
    """The whole azure conv trace, decode and transfer included."""
    workload = read_trace(DATA / "azure_llm_2023_conv.csv.gz")
    started = time.process_time()
    _summary(config_for("lanewise", 1), workload)
    seconds = time.process_time() - started
    print(f"azure conv, {len(workload.requests)} requests, with decode: {seconds:.1f} s of one core")
    return seconds <= 20


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=170)


PARTS: dict[str, Callable[[], bool]] = {
    "one": lambda: comparison("1 prefill instance", ONE, ONE_POLICIES, 1),
    "eight": lambda: comparison("8 prefill instances", EIGHT, EIGHT_POLICIES, 8),
    "closed": closed,
    "capacity": capacity,
    "speed": speed,
}


def main(argv: Sequence[str]) -> int:
    """Prints the parts; 0 where every target is reached, 1 otherwise, 2 for an unknown part."""
    names = argv or list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"no part {unknown[0]!r}; expected {', '.join(PARTS)}", file=sys.stderr)
        return 2
    results = {name: PARTS[name]() for name in names}
    for name, reached in results.items():
        print(f"{name}: {'reached' if reached else 'NOT reached'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
