"""Is the simulator right? One trace on real processes and in `lanewise.sim`, with a profile measured minutes before.

Owns: the two traces, the replays, what is fitted on the first, and the verdict (TTFT p50 and p90 within 10 %).
Must not: tune anything on the trace that is judged.

    python benchmarks/fidelity.py [--requests 1000] [--replays 5] [--load 0.6] [--json F]

1. `lanewise profile` measures the engine on one core, on prompts of its own: from it come the arrival rates.
2. A calibration trace (other lengths in another order, other arrivals, other prompts) is served and simulated, and the
   prefill worker asked for the profile that it has refitted from those batches: it holds what gRPC and transfer threads
   take of its core while it computes, which a profile of the engine alone does not know. One constant comes from the
   calibration: the difference of the median TTFTs (client, router, two streams).
3. The judged trace is served by one router, one prefill and one decode worker, each worker on one core (router and
   client on any but the prefill worker's), and simulated once. Compared are simulated + constant and the median.
Both are served `replays` times in turns, for the speed of a machine changes by the minute: the profile is the median,
coefficient by coefficient, of those read after each calibration, the constant that of the calibrations.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from lanewise.bench.drive import Sample, open_loop
from lanewise.bench.report import percentile, times
from lanewise.bench.targets import Settings, connect
from lanewise.bench.workload import Ask, Prompts
from lanewise.config import WorkerConfig
from lanewise.policy.cost import CostModel
from lanewise.policy.profile import Profile
from lanewise.sim.cluster import SimConfig, simulate
from lanewise.sim.service import load_profile
from lanewise.sim.workload import Request, Workload, read_trace
from tests.e2e.service import Service, running, service_file

DATA = Path(__file__).parent / "data"
LONGEST = 1900  # of the built-in model's context of 2048
# Times the lengths of the lmsys prompts. At their own lengths (a prefill takes 5 ms here) load 0.6 is 120 requests a
# second, which saturate the other core (decode, router, client): TTFT is then its queue, 90 of 100 ms, and the replay
# says nothing of scheduling. At four times their lengths that core is still busy for three quarters of the time.
STRETCH = 12
OUTPUT_TOKENS = 4
TOLERANCE = 0.10
SETTINGS = Settings(model="fable", temperature=0.0, ignore_eos=True, timeout_s=120.0)


def measure_profile(folder: Path) -> Profile:
    """In a process of its own, on the core the prefill worker will have."""
    output = folder / "profile.yaml"
    command = [sys.executable, "-m", "lanewise", "profile", "--cores", "[0]", "--threads", "1", "--output", str(output)]
    subprocess.run(command, check=True, timeout=240)
    print(output.read_text())
    return load_profile(str(output), folder)


def trace(profile: Profile, count: int, load: float, seed: int) -> list[Ask]:
    """Stretched lengths of the lmsys prompts, drawn with this seed; Poisson arrivals that keep the worker busy this
    share of the time."""
    known = [min(STRETCH * r.prompt_tokens, LONGEST) for r in read_trace(DATA / "lmsys10k_lengths.csv.gz").requests]
    draw = random.Random(f"fidelity {seed}")
    lengths = [draw.choice(known) for _ in range(count)]
    rate = load / (sum(profile.cost.alone(n) for n in lengths) / count)
    asks, now = [], 0.0
    for index, length in enumerate(lengths):
        now += draw.expovariate(rate)
        asks.append(Ask(index, now, length, OUTPUT_TOKENS, ""))
    return asks


def refitted(service: Service, profile: Profile, folder: Path) -> Profile:
    """As the prefill worker has measured it in its latest batches."""
    address = next(w.address for w in service.snapshot().workers if w.description.role == "prefill")
    output = folder / "refitted.yaml"
    command = [sys.executable, "-m", "lanewise", "profile", "--worker", address, "--output", str(output)]
    subprocess.run(command, check=True, timeout=60)
    return replace(profile, cost=load_profile(str(output), folder).cost)


def middle(profiles: Sequence[Profile]) -> Profile:
    """The median of each coefficient."""
    costs = [asdict(profile.cost) for profile in profiles]
    return replace(profiles[0], cost=CostModel(**{name: median(cost[name] for cost in costs) for name in costs[0]}))


def simulated(profile: Profile, asks: Sequence[Ask]) -> list[float]:
    """TTFT in seconds, without any constant."""
    requests = tuple(Request(a.index, a.arrival_s or 0.0, a.prompt_tokens, a.output_tokens) for a in asks)
    defaults = WorkerConfig()
    config = SimConfig(
        (profile,),
        (profile,),
        policy=defaults.batch_policy,
        max_batch_tokens=defaults.max_batch_tokens,
        ttft_target_s=defaults.ttft_target_s,
    )
    outcome = simulate(config, Workload("fidelity", requests))
    return [track.ttft_s for track in outcome.tracks if track.ttft_s is not None]


def leave_to_prefill(service: Service) -> None:
    """The prefill worker has its core to itself: this client, the router and the supervisor keep off it."""
    others = os.sched_getaffinity(0) - os.sched_getaffinity(service.pid("prefill"))
    for pid in (os.getpid(), service.process.pid, service.pid("router")):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), others)


async def served(url: str, asks: Sequence[Ask], seed: int) -> list[float]:
    """TTFT in seconds on the real service."""
    samples: list[Sample] = []
    target = connect(url, SETTINGS)
    try:
        await open_loop(target, asks, Prompts(seed, (100, 2000)), SETTINGS, samples.append)
    finally:
        await target.close()
    failed = [sample.answer for sample in samples if sample.answer.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(samples)} requests failed: {failed[0].error}: {failed[0].detail}")
    return [found.ttft_s for sample in samples if (found := times(sample)) is not None]


def points(ttft_s: Sequence[float]) -> tuple[float, float]:
    """(p50, p90) in milliseconds."""
    ordered = sorted(ttft_s)
    return 1e3 * percentile(ordered, 50), 1e3 * percentile(ordered, 90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is stopped then too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        profile = measure_profile(folder)
        first = trace(profile, options.requests // 2, options.load, 1)
        judged = trace(profile, options.requests, options.load, 2)
        roles = {role: {"replicas": 1, "kvCacheMemory": "512Mi"} for role in ("prefill", "decode")}
        profiles, calibrations, replays = [], [], []
        with running(folder / "state", service_file(folder, disaggregation="Always", **roles)) as service:
            url = f"grpc://{service.grpc}"
            leave_to_prefill(service)
            asyncio.run(served(url, first, 0))  # memory that was never touched, cold caches
            for number in range(options.replays):
                calibrations.append(points(asyncio.run(served(url, first, 100 + number))))
                profiles.append(refitted(service, profile, folder))
                replays.append(points(asyncio.run(served(url, judged, 200 + number))))
                told = (calibrations[-1], replays[-1], 1e3 * profiles[-1].cost.alone(512))
                print("{0[0]:.1f} and {0[1]:.1f}, {1[0]:.1f} and {1[1]:.1f} ms, {2:.1f}".format(*told), flush=True)
    profile = middle(profiles)
    constant = median(p50 for p50, _ in calibrations) - points(simulated(profile, first))[0]
    real = tuple(median(values) for values in zip(*replays, strict=True))
    expected = tuple(value + constant for value in points(simulated(profile, judged)))
    errors = [b / a - 1 for a, b in zip(real, expected, strict=True)]
    print(f"from {len(first)} requests of another trace: constant {constant:.2f} ms, {profile.cost}")
    for label, a, b, error, column in zip(
        ("p50", "p90"), real, expected, errors, zip(*replays, strict=True), strict=True
    ):
        runs = ", ".join(f"{value:.1f}" for value in column)
        print(f"TTFT {label}: real {a:.1f} ms (replays {runs}), simulated {b:.1f} ms: {100 * error:+.1f} %")
    if options.json:
        options.json.write_text(json.dumps({"constant_ms": constant, "real_ms": real, "simulated_ms": expected}) + "\n")
    return 0 if all(abs(error) <= TOLERANCE for error in errors) else 1


if __name__ == "__main__":
    sys.exit(main())
