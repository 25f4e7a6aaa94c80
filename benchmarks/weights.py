"""What each form of the weights costs and gains: `--weights full | int8 | fp8 | w8a8`, in one process, in turn.

    python benchmarks/weights.py MODEL [--threads 2]       # the time of steps; peers.py --make writes a 118 M model
    python benchmarks/weights.py --quality [--dtype bfloat16]    # what fable says of a text it has never seen

Quality, beside full weights of the same dtype: bits per byte of the tests' held-out text in windows of 1024 tokens,
each token predicted from the text before it; how far the logits are from the full ones (root mean square, as a share of
their standard deviation); how often the most likely token is the same.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from lanewise.config import WorkerConfig
from lanewise.engine.quantise import FORMS
from lanewise.engine.runner import Engine, Work
from lanewise.engine.sequence import Sequence
from lanewise.kernels.plan import Span
from lanewise.request import Sampling

ROOT = Path(__file__).parents[1]
SHAPES = {
    "decode 1 x 128": (1, 128, 1),
    "decode 16 x 128": (16, 128, 1),
    "prefill 32": (1, 0, 32),
    "prefill 128": (1, 0, 128),
    "prefill 1024": (1, 0, 1024),
}
"""Sequences, tokens of context, new tokens of each."""
WINDOW = 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model directory")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring, in all")
    options = parser.parse_args()
    if options.quality:
        quality(options.dtype, options.threads)
    elif options.model:
        speed(options.model, options.dtype, options.threads, options.seconds)
    else:
        parser.error("give a model directory or --quality")
    return 0


def load(model: str, form: str, dtype: str, threads: int) -> Engine:
    return Engine.load(
        WorkerConfig(model=model, dtype=dtype, weights=form, threads=threads, device="cpu", kv_cache_bytes=512 << 20)
    )


def speed(model: str, dtype: str, threads: int, seconds: float) -> None:
    engines = {form: load(model, form, dtype, threads) for form in FORMS}
    times: dict[tuple[str, str], list[float]] = {(form, shape): [] for form in FORMS for shape in SHAPES}
    clock = time.thread_time if threads == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end or turn < 3:
        for name, shape in SHAPES.items():
            for form in (*FORMS[turn % len(FORMS) :], *FORMS[: turn % len(FORMS)]):
                for _ in range(6 if shape[2] == 1 else 2):  # the first meets cold caches and is left out
                    taken = step_s(engines[form], *shape, clock=clock)
                    times[form, name].append(taken)
                times[form, name].pop(-6 if shape[2] == 1 else -2)
        turn += 1
    kind = "CPU time" if threads == 1 else "wall time"
    print(f"\n{engines['full'].kernels}, {dtype}, {threads} threads, median ms of {kind} ({turn} turns), ratio to full")
    print(f"{'':<18}" + "".join(f"{form:>16}" for form in FORMS))
    for name in SHAPES:
        full = statistics.median(times["full", name])
        found = (statistics.median(times[form, name]) for form in FORMS)
        print(f"{name:<18}" + "".join(f"{1e3 * value:9.2f} {value / full:5.2f}x" for value in found))


def step_s(engine: Engine, count: int, context: int, new: int, *, clock: object) -> float:
    """One step; the context was never computed, which changes nothing about the time."""
    work = []
    for index in range(count):
        ids = [(7 * i + 13 * index) % 30_000 + 300 for i in range(context + new)]
        seq = Sequence((f"s{index}", 1), ids, len(ids), Sampling(max_tokens=2, temperature=0.0))
        assert engine.pool.ensure(seq, len(ids))
        seq.num_computed = context
        work.append(Work(seq, new))
    try:
        started = clock()  # type: ignore[operator]
        engine.step(work)
        return float(clock() - started)  # type: ignore[operator]
    finally:
        for item in work:
            engine.pool.release(item.seq)


def quality(dtype: str, threads: int) -> None:
    text = (ROOT / "tests/data/fable_heldout.txt").read_text(encoding="utf-8")
    engines = {form: load("builtin://fable", form, dtype, threads) for form in FORMS}
    tokenizer = Tokenizer.from_file(str(engines["full"].model_dir / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    windows = [[0, *ids[start : start + WINDOW - 1]] for start in range(0, len(ids), WINDOW - 1)]
    nats, same, error, spread, count = (
        dict.fromkeys(FORMS, 0.0),
        dict.fromkeys(FORMS, 0),
        dict.fromkeys(FORMS, 0.0),
        0.0,
        0,
    )
    for rows in zip(*(predictions(engines[form], windows) for form in FORMS), strict=True):
        following = rows[0][0]
        whole = rows[0][1]
        count += len(following)
        spread += float(whole.var(1).sum())
        for form, (_, logits) in zip(FORMS, rows, strict=True):
            nats[form] -= float(logits.log_softmax(1).gather(1, following[:, None]).sum())
            same[form] += int((logits.argmax(1) == whole.argmax(1)).sum())
            error[form] += float((logits - whole).square().mean(1).sum())
    print(f"\nfable, {engines['full'].kernels}, {dtype}, {count} predictions, {len(text.encode())} bytes")
    print(f"{'':<8}{'bits/byte':>12}{'logit error':>14}{'same best token':>18}")
    for form in FORMS:
        bits = nats[form] / math.log(2) / len(text.encode())
        print(f"{form:<8}{bits:12.4f}{math.sqrt(error[form] / spread):14.2%}{same[form] / count:18.2%}")


@torch.inference_mode()
def predictions(engine: Engine, windows: list[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each position, over all windows at once: the tokens that follow, and the logits of them."""
    seqs = [Sequence((f"w{i}", 1), ids, len(ids), Sampling(max_tokens=1)) for i, ids in enumerate(windows)]
    for seq in seqs:
        assert engine.pool.ensure(seq, len(seq.ids))
    for position in range(WINDOW - 1):
        there = [seq for seq in seqs if position + 1 < len(seq.ids)]
        if not there:
            return
        spans = [Span(seq.pages, position, 1) for seq in there]
        ids = [seq.ids[position : position + 1] for seq in there]
        logits = engine._decoder.run(spans, ids, [True] * len(there))  # all logits: a step would give the sampled token
        assert logits is not None
        for seq in there:
            seq.num_computed += 1
        yield torch.tensor([seq.ids[position + 1] for seq in there]), logits


if __name__ == "__main__":
    sys.exit(main())
