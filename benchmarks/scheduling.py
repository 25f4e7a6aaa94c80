"""Batch policies side by side on real processes: the built-in model, one prefill and one decode worker per policy.

Owns: which loads and policies are compared, the interleaving, the table, the plot and the JSON of docs/scheduling.md.
Must not: hold a policy or a definition; `lanewise.policy` and `lanewise.bench` do.

    python benchmarks/scheduling.py [mixed] [closed] [--runs 3] [--requests 100] [--json F] [--plot F]

All services are up at once and idle but for the one that is asked, and each run of a load goes over all policies before
the next, in closed loops in slices of seconds: what disturbs the machine for a while disturbs all of them. Medians over
the runs; of closed loops, whose services are started anew for each run, of what each run says of two policies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from lanewise.bench.drive import Sample, closed_loop, open_loop
from lanewise.bench.report import percentile, times
from lanewise.bench.targets import Settings, connect
from lanewise.bench.workload import Ask, Lengths, Prompts, synthetic
from lanewise.sim.workload import read_trace
from tests.e2e.service import Service, running, service_file, until

POLICIES = ("lanewise", "fcfs-8192", "fcfs-1024", "laps-8192")
PLAIN = ("fcfs-8192", "fcfs-1024")
PROMPTS, OUTPUTS = "80%:64,20%:1536", "64"  # as in the mixed measurement of benchmarks/peers.py
LONGEST = 1900  # of the built-in model's context of 2048
SLICE, TURNS = 60, 20
"""A slice of a closed loop has so many requests and TURNS for each client: at its end only long prompts are left of a
queue that is not in order."""
LEAST = 400  # requests of a run
WARM = 400
"""Requests of a closed loop before those that count: services have just been started or had another load. By then the
cost model has been refitted, and the loop is known as one, which takes 16 batches of some length."""
CLOSED_CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128)
POISSON_LOAD = 0.7  # of the requests per second that the closed loop of 16 served
SETTINGS = Settings(model="fable", temperature=0.0, ignore_eos=True, timeout_s=300.0)
READY_S = 240.0  # for all of them
STARTED = time.monotonic()
TIDY_S = 0.3  # between two runs: statistics and audits of the last one are over


@dataclass(frozen=True, slots=True)
class Load:
    """`clients`: a closed loop; else Poisson arrivals at `rate` per second."""

    name: str
    clients: int = 0
    rate: float = 0.0


Figures = Callable[[Sequence[Sequence[Sample]]], dict[str, float]]
"""Of the slices of one run."""


async def run(url: str, load: Load, asks: Sequence[Ask], seed: int) -> list[Sample]:
    """One load on one service; every request must succeed."""
    samples: list[Sample] = []
    target = connect(url, SETTINGS)
    prompts = Prompts(seed, (100, 2000))
    try:
        if load.clients:
            await closed_loop(target, asks, prompts, SETTINGS, load.clients, samples.append)
        else:
            await open_loop(target, asks, prompts, SETTINGS, samples.append)
    finally:
        await target.close()
    failed = [sample.answer for sample in samples if sample.answer.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(samples)} requests failed: {failed[0].error}: {failed[0].detail}")
    await asyncio.sleep(TIDY_S)
    return samples


def mixed_figures(slices: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Milliseconds by class of prompt, and requests per second."""
    samples = [sample for part in slices for sample in part]
    short = [sample for sample in samples if sample.ask.prompt_tokens <= 256]
    long = [sample for sample in samples if sample.ask.prompt_tokens > 256]
    figures = {"rate": _rate(slices)}
    for name, group in (("short", short), ("long", long)):
        found = [item for sample in group if (item := times(sample)) is not None]
        ttft, itl = sorted(item.ttft_s for item in found), sorted(gap for item in found for gap in item.itl_s)
        figures |= {f"{name}_ttft_p{p}": 1e3 * percentile(ttft, p) for p in (50, 90, 99)}
        figures |= {f"{name}_itl_p{p}": 1e3 * percentile(itl, p) for p in (50, 99)}
    return figures


def _rate(slices: Sequence[Sequence[Sample]]) -> float:
    taken = (max(x.answer.end_s for x in part) - min(x.scheduled_s for x in part) for part in slices)
    return sum(map(len, slices)) / sum(taken)


def medians(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """policy -> medians over the runs."""
    return {
        policy: {name: median(run[policy][name] for run in runs) for name in figures}
        for policy, figures in runs[0].items()
    }


def start(stack: ExitStack, policies: Sequence[str]) -> dict[str, Service]:
    """One service per policy, warm. Services share the machine's cores; only one is asked at a time."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    services = {}
    for policy in policies:
        roles = {role: {"replicas": 1, "kvCacheMemory": "256Mi"} for role in ("prefill", "decode")}
        file = service_file(folder / policy, disaggregation="Always", **roles)
        env = {"LANEWISE_BATCH_POLICY": policy}
        services[policy] = stack.enter_context(running(folder / policy / "state", file, env=env, ready=False))
    for service in services.values():  # they load side by side
        until(lambda service=service: service.record.get("ready", False), READY_S, service.read_log)  # type: ignore[misc]
    for policy, service in services.items():
        warm = synthetic(10, None, Lengths.parse(PROMPTS), Lengths.parse("4"), 99)
        asyncio.run(run(f"grpc://{service.grpc}", Load(policy, clients=4), warm, 10**6))
    return services


def compare(
    services: dict[str, Service], load: Load, slices: Sequence[Sequence[Ask]], number: int, figures: Figures
) -> dict[str, dict[str, float]]:
    """policy -> figures of one run."""
    shuffled = random.Random(number)
    # Prompts no run before had, whatever the part: caches stay cold.
    seed = zlib.crc32(f"{figures.__name__} {load.name} {number}".encode())
    samples: dict[str, list[Sequence[Sample]]] = {policy: [] for policy in services}
    for asks in slices:
        for policy in shuffled.sample(list(services), len(services)):
            samples[policy].append(asyncio.run(run(f"grpc://{services[policy].grpc}", load, asks, seed)))
    print(f"{load.name}: run {number + 1} after {time.monotonic() - STARTED:.0f} s", flush=True)
    return {policy: figures(parts) for policy, parts in samples.items()}


def mixed(services: dict[str, Service], runs: int, requests: int) -> tuple[dict[str, Any], bool]:
    """The mixed workload: closed loops of 4 and 16, then Poisson at a share of what the latter served."""
    lengths, outputs = Lengths.parse(PROMPTS), Lengths.parse(OUTPUTS)
    asks = synthetic(requests, None, lengths, outputs, 0)
    found: dict[str, Any] = {}

    def add(load: Load, asks: Sequence[Ask]) -> None:
        found[load.name] = medians([compare(services, load, [asks], number, mixed_figures) for number in range(runs)])
        columns = ("rate", "short_ttft_p50", "short_ttft_p99", "long_ttft_p50", "long_ttft_p99")
        show(f"mixed, {load.name}: requests/s, ms", found[load.name], (*columns, "short_itl_p50", "short_itl_p99"))

    add(Load("16 clients", clients=16), asks)
    add(Load("4 clients", clients=4), asks)
    rate = POISSON_LOAD * found["16 clients"]["fcfs-8192"]["rate"]
    add(Load(f"Poisson {rate:.1f}/s", rate=rate), synthetic(requests, rate, lengths, outputs, 1))
    ours, plain = found["16 clients"]["lanewise"], found["16 clients"]["fcfs-8192"]
    share = ours["short_ttft_p50"] / plain["short_ttft_p50"]
    spread = ours["short_itl_p99"] / ours["short_itl_p50"]
    print(f"16 clients: short TTFT p50 is {share:.2f} of fcfs-8192 (at most 0.5); ITL p99/p50 {spread:.2f} (at most 3)")
    return found, share <= 0.5 and spread <= 3


def closed(runs: int, levels: Sequence[int]) -> tuple[dict[str, Any], bool]:
    """Closed loops on lmsys lengths: never slower than the better of the plain queues. Services are started anew for
    each run: where its memory came to lie makes a process 5 to 10 % faster or slower for as long as it lives."""
    lengths = [min(r.prompt_tokens, LONGEST) for r in read_trace(DATA / "lmsys10k_lengths.csv.gz").requests]
    loads = [Load(f"{clients} clients", clients=clients) for clients in levels]
    results: dict[str, list[dict[str, dict[str, float]]]] = {load.name: [] for load in loads}
    for number in range(runs):
        with ExitStack() as stack:
            services = start(stack, ("lanewise", *PLAIN))
            for load in loads:
                slices = _slices(lengths, load.clients)
                _warm(services, load, [ask for part in slices for ask in part][:WARM])
                results[load.name].append(compare(services, load, slices, number, _closed_figures))
    reached = True
    for name, by_run in results.items():
        rate = min(_beside(by_run, plain, "rate") for plain in PLAIN)
        wait = min(1 / _beside(by_run, plain, "ttft_p50") for plain in PLAIN)
        reached = reached and rate >= 0.95 and wait >= 0.95
        show(f"lmsys lengths, {name}: requests/s, median TTFT ms", medians(by_run), ("rate", "ttft_p50"))
        print(f"{name}: throughput {rate:.3f} of the better plain queue, median TTFT {wait:.3f} (at least 0.95)")
    return results, reached


def _warm(services: dict[str, Service], load: Load, asks: Sequence[Ask]) -> None:
    """Prompts as long as those that count, of other text."""
    for number, service in enumerate(services.values()):
        asyncio.run(run(f"grpc://{service.grpc}", load, asks, zlib.crc32(f"warm {load.name} {number}".encode())))


def _slices(lengths: Sequence[int], clients: int) -> list[list[Ask]]:
    """Of one run."""
    size = SLICE + TURNS * clients
    count = -(-LEAST // size)
    asks = [Ask(i, None, n, 1, "") for i, n in enumerate(lengths[: count * size])]
    return [asks[at : at + size] for at in range(0, len(asks), size)]


def _beside(runs: Sequence[dict[str, dict[str, float]]], plain: str, name: str) -> float:
    """Median over the runs of ours in parts of a plain queue's."""
    return median(run["lanewise"][name] / run[plain][name] for run in runs)


def _closed_figures(slices: Sequence[Sequence[Sample]]) -> dict[str, float]:
    ttft = sorted(found.ttft_s for part in slices for sample in part if (found := times(sample)) is not None)
    return {"rate": _rate(slices), "ttft_p50": 1e3 * percentile(ttft, 50)}


def show(title: str, by_policy: dict[str, dict[str, float]], columns: Sequence[str]) -> None:
    view = Table(title=title, title_justify="left", box=SIMPLE)
    view.add_column("policy", no_wrap=True)
    for name in columns:
        view.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for policy, figures in by_policy.items():
        view.add_row(policy, *(f"{figures[name]:.1f}" for name in columns))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(view)


def draw(found: dict[str, Any], path: Path) -> None:
    """Short and long TTFT by policy and load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.6), sharey=True)
    for axis, (name, by_policy) in zip(axes, found.items(), strict=True):
        places = range(len(by_policy))
        for shift, kind in ((-0.2, "short"), (0.2, "long")):
            heights = [figures[f"{kind}_ttft_p50"] for figures in by_policy.values()]
            tips = [
                figures[f"{kind}_ttft_p99"] - height
                for figures, height in zip(by_policy.values(), heights, strict=True)
            ]
            axis.bar(
                [p + shift for p in places],
                heights,
                0.4,
                yerr=[[0] * len(tips), tips],
                capsize=2,
                label=f"{kind} prompts",
            )
        axis.set_title(name)
        axis.set_yscale("log")
        axis.set_xticks(list(places), list(by_policy), rotation=40, ha="right")
    axes[0].set_ylabel("TTFT p50, whisker p99 (ms)")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


DATA = Path(__file__).parent / "data"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["mixed", "closed", []], default=[])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100, help="of one run of the mixed workload")
    parser.add_argument("--clients", type=int, nargs="+", default=CLOSED_CLIENTS, help="of the closed loops")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the services are stopped then too
    parts = options.parts or ["mixed", "closed"]
    results: dict[str, Any] = {}
    reached = []
    if "mixed" in parts:
        with ExitStack() as stack:
            results["mixed"], good = mixed(start(stack, POLICIES), options.runs, options.requests)
        reached.append(good)
    if "closed" in parts:
        results["closed"], good = closed(max(options.runs, 5), options.clients)
        reached.append(good)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot and "mixed" in results:
        draw(results["mixed"], options.plot)
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
