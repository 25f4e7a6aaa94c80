"""What a lossy encoding of the KV channel costs in quality, and its speed: fable on text it has never seen.

Owns: the measurement of docs/kv-channel.md. Must not: hold an encoding of its own; `lanewise.transfer.encoding` does.

    python benchmarks/encodings.py [--dtype float32] [--threads 2]

For each passage of the tests' held-out text the first 512 tokens are the prompt, computed natively; its KV goes through
the encoding, as a decode worker would get it, but for the last token, which is computed on top. From there on:

- perplexity of the text that follows (64 tokens), and how far the logits are from the native ones (root mean square, as
  a share of their standard deviation);
- greedy match: of 64 tokens chosen one by one, the share of passages where all are the native ones, and the mean
  number before the first that is not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from lanewise.config import WorkerConfig
from lanewise.engine.runner import Engine
from lanewise.engine.sequence import Sequence
from lanewise.kernels.plan import Span
from lanewise.policy.blocks import KVLayout
from lanewise.request import Sampling
from lanewise.transfer.encoding import ENCODINGS, Encoding, wire_layout

ROOT = Path(__file__).parents[1]
PROMPT, FOLLOWING = 512, 64
SHAPE = KVLayout(28, 4, 128, "bfloat16", 2)
"""For the speed: Qwen2.5-7B's KV, 56 KiB a token."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    speed()
    quality(options.dtype, options.threads)
    return 0


def speed() -> None:
    native = np.random.default_rng(0).standard_normal(SHAPE.slice_bytes(256, 28) // 4).astype(np.float32)
    raw = (native.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)  # half as many bytes: 128 tokens
    print(f"{'':<8}{'wire bytes':>12}{'encode GB/s':>14}{'decode GB/s':>14}   (native bytes, one core)")
    for name in ENCODINGS[1:]:
        encoding = Encoding(wire_layout(SHAPE, name))
        wire = np.empty(encoding.layout.wire_bytes(128, 28), np.uint8)
        there, home = [], []
        for _ in range(9):
            started = time.thread_time()
            encoding.encode(raw, 128, 28, wire)
            middle = time.thread_time()
            encoding.decode(wire.data, 128, 28)
            there.append(middle - started)
            home.append(time.thread_time() - middle)
        rates = (raw.nbytes / statistics.median(times) / 1e9 for times in (there, home))
        print(f"{name:<8}{wire.nbytes / raw.nbytes:12.1%}" + "".join(f"{rate:14.2f}" for rate in rates))


@torch.inference_mode()
def quality(dtype: str, threads: int) -> None:
    engine = Engine.load(
        WorkerConfig(
            model="builtin://fable",
            dtype=dtype,
            threads=threads,
            device="cpu",
            kv_cache_bytes=256 << 20,
            page_tokens=64,
        )
    )
    text = (ROOT / "tests/data/fable_heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(engine.model_dir / "tokenizer.json")).encode(text).ids
    length = PROMPT + FOLLOWING - 1
    passages = [[0, *ids[at : at + length]] for at in range(0, len(ids) - length + 1, length)]
    nats, error = dict.fromkeys(ENCODINGS, 0.0), dict.fromkeys(ENCODINGS, 0.0)
    same: dict[str, list[int]] = {name: [] for name in ENCODINGS}
    spread = 0.0
    for passage in passages:
        following = torch.tensor(passage[PROMPT:])
        native, chosen = torch.empty(0), list[int]()
        for name in ENCODINGS:
            logits = answers(engine, passage, name)
            greedy = choose(engine, passage, name)
            if name == "Native":
                native, chosen = logits, greedy
                spread += float(native.var(1).sum())
            nats[name] -= float(logits.log_softmax(1).gather(1, following[:, None]).sum())
            error[name] += float((logits - native).square().mean(1).sum())
            same[name].append(
                next((i for i, (a, b) in enumerate(zip(greedy, chosen, strict=True)) if a != b), FOLLOWING)
            )
    count = len(passages) * FOLLOWING
    print(f"\nfable, {engine.kernels}, {dtype}, {len(passages)} prompts of {PROMPT} tokens, {FOLLOWING} after each")
    print(f"{'':<8}{'perplexity':>12}{'logit error':>14}{'all 64 equal':>15}{'equal tokens':>15}")
    for name in ENCODINGS:
        whole = sum(n == FOLLOWING for n in same[name]) / len(passages)
        print(
            f"{name:<8}{math.exp(nats[name] / count):12.3f}{math.sqrt(error[name] / spread):14.2%}"
            f"{whole:15.1%}{statistics.mean(same[name]):15.1f}"
        )
    engine.close()


def transferred(engine: Engine, passage: list[int], name: str) -> Sequence:
    """A sequence whose prompt, but for the last token, was computed natively and has come by this encoding."""
    seq = Sequence((name, 1), list(passage), PROMPT, Sampling(max_tokens=FOLLOWING))
    assert engine.pool.ensure(seq, len(passage))
    have = PROMPT - 1
    engine._decoder.run([Span(seq.pages, 0, have)], [passage[:have]], [True])
    seq.num_computed = have
    encoding = Encoding.of(wire_layout(engine.pool.layout, name))
    if encoding is not None:
        layers, pages = engine.pool.layout.num_layers, list(seq.pages)
        where = range(have), range(layers), range(engine.pool.layout.num_kv_heads)
        raw = engine.pool.read(pages, *where)
        wire = np.empty(encoding.layout.wire_bytes(have, layers), np.uint8)
        encoding.encode(raw.reshape(-1), have, layers, wire)
        engine.pool.write(pages, *where, encoding.decode(wire.data, have, layers))
    return seq


def answers(engine: Engine, passage: list[int], name: str) -> torch.Tensor:
    """Logits of each token after the prompt, given the text before it."""
    seq, rows = transferred(engine, passage, name), []
    try:
        for position in range(PROMPT - 1, len(passage) - 1):
            logits = engine._decoder.run([Span(seq.pages, position, 1)], [passage[position : position + 1]], [True])
            assert logits is not None
            rows.append(logits.clone())
        return torch.cat(rows)
    finally:
        engine.pool.release(seq)


def choose(engine: Engine, passage: list[int], name: str) -> list[int]:
    """The most likely tokens, one after the other."""
    seq, token, found = transferred(engine, passage, name), passage[PROMPT - 1], list[int]()
    try:
        for position in range(PROMPT - 1, PROMPT - 1 + FOLLOWING):
            logits = engine._decoder.run([Span(seq.pages, position, 1)], [[token]], [True])
            assert logits is not None
            token = int(logits[0].argmax())
            found.append(token)
        return found
    finally:
        engine.pool.release(seq)


if __name__ == "__main__":
    sys.exit(main())
