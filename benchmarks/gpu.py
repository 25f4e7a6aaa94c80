"""The table of the GPU path: random weights in the shape of a real model, real processes, lmsys prompt lengths.

    python benchmarks/gpu.py --shape 32b 7b --json gpu.json                # one GPU, about 20 minutes a shape
    python benchmarks/gpu.py --shape tiny --device cpu --json tiny.json    # all of its way through, on any machine
    python benchmarks/gpu.py --table gpu.json                              # the table of what has been measured

Three parts, `--only` takes some of them; what each finds is added to the JSON at once:
- `engine`: decode step, prefill and a plain product in one process (benchmarks/gpu_engine.py);
- `serve`: router and one worker, closed loops, one output token, no prompt twice: Lanewise, and FCFS without graphs;
- `split`: prefill and decode as two processes on the one GPU beside one process, KV travelling between them.
One server lives at a time, since two do not fit. Server-side TTFT is the router's own, from the arrival of a request to
its first token (the mean of `lanewise_ttft_seconds`); percentiles are the client's, which add its HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_models import SHAPES, TOKEN_IDS, Shape, make_model
from benchmarks.gpu_table import table
from benchmarks.peers import Server, lanewise, running
from lanewise.bench.drive import Sample, closed_loop
from lanewise.bench.report import Slo, summarise, times
from lanewise.bench.targets import Settings, connect
from lanewise.bench.workload import Ask, Prompts

ROOT = Path(__file__).parents[1]
PARTS = ("engine", "serve", "split")
LENGTHS = ROOT / "benchmarks/data/lmsys10k_lengths.csv.gz"
FCFS = {"LANEWISE_BATCH_POLICY": "fcfs-8192", "LANEWISE_GRAPH_CAPTURE_S": "0"}
CAPTURE_S = 120.0
SPLIT_OUTPUT_TOKENS = 16
SPLIT_CROWD = 32
ENGINE_S = 1200.0


def main() -> int:
    options = parse()
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.shape:
            model = (options.models or Path(temporary)) / name
            print(f"{name}: writing weights", flush=True)
            make_model(model, SHAPES[name])
            for part in options.only or PARTS:
                found.setdefault(name, {})[part] = measure(part, name, model, options)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1))
    print(table(found))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["32b", "7b"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernels", help="default: triton on cuda, auto on cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the weights there; default: a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; parts that are there already are kept")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file and end")
    options = parser.parse_args()
    options.kernels = options.kernels or ("triton" if options.device == "cuda" else "auto")
    return options


def measure(part: str, name: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    if part == "engine":
        return engine(name, model, options)
    with tempfile.TemporaryDirectory() as folder:
        return (serve if part == "serve" else split)(SHAPES[name], model, Path(folder), options)


def engine(name: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/gpu_engine.py", str(model), "--shape", name]
    command += ["--device", options.device, "--kernels", options.kernels]
    environment = {**os.environ, "LANEWISE_GRAPH_CAPTURE_S": f"{CAPTURE_S:g}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=ENGINE_S)
    if done.returncode:
        raise SystemExit(f"engine {name}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"engine {name}: {found}", flush=True)
    return found


def serve(shape: Shape, model: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """By server and concurrency: a report of `lanewise bench`, and `server_ttft_ms`."""
    found: dict[str, Any] = {}
    for name, extra in (("fcfs", FCFS), ("lanewise", {})):
        with started(name, "Never", shape, model, folder, options, extra) as server:
            found[name] = {}
            for concurrency in shape.concurrencies:
                requests = max(shape.least_requests, 8 * concurrency)
                asks = lmsys(requests + concurrency, shape.context_tokens - 2, concurrency)
                load(server, asks[requests:], seed=1_000_000 + concurrency, concurrency=concurrency)  # warm
                report = load(server, asks[:requests], seed=concurrency, concurrency=concurrency)
                found[name][str(concurrency)] = report
                said = f"{report['request_rate']:.1f}/s, TTFT p50 {report['ttft_ms']['p50']:.1f} ms"
                print(f"  {name} x {concurrency}: {said}, server {report['server_ttft_ms']:.1f} ms", flush=True)
    return found


def split(shape: Shape, model: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process, then two with KV between them: where a transfer shows is the second token."""
    found: dict[str, Any] = {}
    for name, disaggregation in (("together", "Never"), ("split", "Always")):
        with started(name, disaggregation, shape, model, folder, options, {}) as server:
            found[name] = {"prompts": 0}
            for number, concurrency in enumerate((1, min(SPLIT_CROWD, max(shape.concurrencies)))):
                count = max(shape.least_requests // 4, 2 * concurrency)
                asks = [Ask(i, None, shape.split_prompt_tokens, SPLIT_OUTPUT_TOKENS, "") for i in range(count + 4)]
                load(server, asks[count:], seed=2_000_000 + number, concurrency=1)  # warm
                report = load(server, asks[:count], seed=2000 + number, concurrency=concurrency)
                found[name][str(concurrency)] = report
                found[name]["prompts"] += len(asks)
                print(f"  {name} x {concurrency}: second token {report['second_token_ms']['p50']:.1f} ms", flush=True)
            found[name]["kv_transfers"] = metric(server, "lanewise_kv_transfers_total")
    return found


@contextmanager
def started(
    name: str,
    disaggregation: str,
    shape: Shape,
    model: Path,
    folder: Path,
    options: argparse.Namespace,
    extra: dict[str, str],
) -> Iterator[Server]:
    both = disaggregation == "Always"
    kv = str(shape.split_kv_bytes) if both or options.device == "cpu" else None
    server = lanewise(name, disaggregation, model, folder, kv_memory=kv, context_tokens=shape.context_tokens)
    server.environment |= {
        "LANEWISE_DEVICE": options.device,
        "LANEWISE_KERNELS": options.kernels,
        "LANEWISE_MAX_RUNNING": str(max(shape.concurrencies)),
        "LANEWISE_MAX_BATCH_TOKENS": str(shape.prefill_tokens),
        "LANEWISE_GRAPH_CAPTURE_S": f"{CAPTURE_S:g}",
        **extra,
    }
    with running(server, folder):
        print(f"{name}: ready after {server.start_s:.1f} s", flush=True)
        yield server


def lmsys(count: int, most: int, seed: int) -> list[Ask]:
    """Prompts of lmsys lengths in an order of their own, one output token each."""
    with gzip.open(LENGTHS, "rt") as file:
        lengths = [int(row["prompt_tokens_qwen"]) for row in csv.DictReader(file)]
    random.Random(seed).shuffle(lengths)
    return [Ask(index, None, max(1, min(length, most)), 1, "") for index, length in enumerate(lengths[:count])]


def load(server: Server, asks: list[Ask], *, seed: int, concurrency: int) -> dict[str, Any]:
    """A closed loop; what the client saw, and the mean TTFT that the router counted meanwhile."""
    before = {name: metric(server, f"lanewise_ttft_seconds_{name}") for name in ("sum", "count")}
    samples = asyncio.run(_drive(server.url, asks, Prompts(seed, TOKEN_IDS), concurrency))
    report = summarise(samples, Slo())
    if report["failed"]:
        raise SystemExit(f"{server.name} x {concurrency}: {report['errors']}")
    total, count = (metric(server, f"lanewise_ttft_seconds_{name}") - before[name] for name in ("sum", "count"))
    if count != len(asks):
        raise SystemExit(f"{server.name}: the router counted {count:g} first tokens of {len(asks)} requests")
    report["server_ttft_ms"] = 1e3 * total / count
    seconds = sorted(s.answer.event_s[1] - s.scheduled_s for s in samples if len(s.answer.event_s) > 1)
    gaps = sorted(found.itl_s[0] for s in samples if (found := times(s)) is not None and found.itl_s)
    for name, values in (("second_token_ms", seconds), ("gap_ms", gaps)):
        report[name] = {"p50": 1e3 * values[len(values) // 2]} if values else None
    return report


async def _drive(url: str, asks: list[Ask], prompts: Prompts, concurrency: int) -> list[Sample]:
    settings = Settings("m", 0.0, True, 600.0)
    target = connect(url, settings)
    samples: list[Sample] = []
    try:
        await closed_loop(target, asks, prompts, settings, concurrency, samples.append)
    finally:
        await target.close()
    return samples


def metric(server: Server, name: str) -> float:
    """A metric of the router that has no labels."""
    url = server.url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


if __name__ == "__main__":
    sys.exit(main())
