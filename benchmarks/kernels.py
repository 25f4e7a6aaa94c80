"""Each native CPU kernel beside its roofline and its library alternative, in one process, in turn.

    python benchmarks/kernels.py [--threads 2] [--json FILE]

The roofline is the larger of two times: the bytes that must be read at the rate a plain read of memory reaches here,
and the operations at the rate a 2048-cubed library product reaches here in this type. `share` is roofline / measured;
the library is torch (oneDNN) for products and torch over gathered pages for attention. Sizes of a 118 M Qwen2.
Medians; with one thread of its CPU time, so that other work on the machine matters less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))

from lanewise.kernels.attention import TorchAttention
from lanewise.kernels.native import Model, NativeDecoder, Packer, available
from lanewise.kernels.plan import Span

HEADS, KV_HEADS, DIM, PAGE = 12, 4, 64, 16
HIDDEN, INNER, VOCAB = 768, 2688, 32_000
COLD_BYTES = 256 << 20  # enough copies of a weight that none is left in a cache
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    kernel: str
    ours_ms: float
    library_ms: float
    roofline_ms: float


@dataclass(frozen=True)
class Roof:
    bytes_per_s: float
    flops: float

    def ms(self, num_bytes: float, operations: float) -> float:
        return 1e3 * max(num_bytes / self.bytes_per_s, operations / self.flops)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    variant = available()
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        roof = measure_roof(dtype)
        name = str(dtype).removeprefix("torch.")
        print(
            f"\n{variant.name}, {name}, {options.threads} threads: memory {roof.bytes_per_s / 1e9:.0f} GB/s, ", end=""
        )
        print(f"products {roof.flops / 1e9:.0f} GFLOP/s")
        print(f"{'kernel':<34}{'ms':>9}{'library':>9}{'roof':>9}{'share':>8}{'faster':>8}")
        model = Model(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, page_tokens=PAGE)
        native = NativeDecoder(variant, model, dtype == torch.bfloat16, options.threads)
        packer = Packer(variant, options.threads)
        for row in (*products(native, packer, dtype, roof), *attentions(native, dtype, roof)):
            share, faster = row.roofline_ms / row.ours_ms, row.library_ms / row.ours_ms
            print(
                f"{row.kernel:<34}{row.ours_ms:9.3f}{row.library_ms:9.3f}{row.roofline_ms:9.3f}{share:8.0%}{faster:7.1f}x"
            )
            rows.append({"dtype": name, **asdict(row)})
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def in_turn(*calls: Callable[[int], object], least_s: float = 0.4) -> list[float]:
    """Median milliseconds of each call, which gets the number of the turn; they take turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    end, turn = time.perf_counter() + least_s * len(calls), 0
    while time.perf_counter() < end or turn < 5:
        for call, found in zip(calls, times, strict=True):
            started = clock()
            call(turn)
            found.append(1e3 * (clock() - started))
        turn += 1
    return [statistics.median(found[1:]) for found in times]


@torch.inference_mode()
def measure_roof(dtype: torch.dtype) -> Roof:
    memory = torch.ones(COLD_BYTES // 4)
    left, right = torch.randn(2, 2048, 2048).to(dtype)
    read_ms, product_ms = in_turn(lambda _: memory.sum(), lambda _: left @ right)
    return Roof(COLD_BYTES / read_ms * 1e3, 2 * 2048**3 / product_ms * 1e3)


@torch.inference_mode()
def products(native: NativeDecoder, packer: Packer, dtype: torch.dtype, roof: Roof) -> Iterator[Row]:
    for name, k, columns in (("gate+up", HIDDEN, 2 * INNER), ("down", INNER, HIDDEN), ("head", HIDDEN, VOCAB)):
        size = k * columns * dtype.itemsize
        copies = max(2, COLD_BYTES // size)
        weights = [torch.randn(columns, k).to(dtype) for _ in range(copies)]
        packed = [packer.pack(weight) for weight in weights]
        for rows in (1, 16) if name == "head" else (1, 4, 16, 64, 128, 1024):
            x = torch.randn(rows, k).to(dtype)

            def ours(
                turn: int, x: torch.Tensor = x, columns: int = columns, packed: list[torch.Tensor] = packed
            ) -> None:
                native.multiply(x, packed[turn % len(packed)], columns)

            def library(turn: int, x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                linear(x, weights[turn % len(weights)])

            yield Row(f"{name} {rows} rows", *in_turn(ours, library), roof.ms(size, 2 * rows * k * columns))


@torch.inference_mode()
def attentions(native: NativeDecoder, dtype: torch.dtype, roof: Roof) -> Iterator[Row]:
    for batch, context, new in (
        (1, 128, 1),
        (16, 128, 1),
        (1, 1024, 1),
        (16, 1024, 1),
        (1, 0, 128),
        (1, 0, 1024),
        (1, 1024, 512),
    ):
        tokens = context + new
        pages = -(-tokens // PAGE)
        copies = max(2, min(64, COLD_BYTES // (batch * pages * PAGE * KV_HEADS * DIM * 2 * dtype.itemsize)))
        caches = [torch.randn(2, batch * pages, PAGE, KV_HEADS, DIM).to(dtype) for _ in range(copies)]
        order = array("i", torch.randperm(batch * pages).tolist())
        spans = [Span(order[i * pages : (i + 1) * pages], context, new) for i in range(batch)]
        query = torch.randn(batch * new, HEADS, DIM).to(dtype)
        new_kv = torch.randn(2, batch * new, KV_HEADS, DIM).to(dtype)
        reference = TorchAttention(DIM, KV_HEADS, PAGE, dtype, CPU)
        plan = reference.plan(spans)

        def ours(
            turn: int, spans: list[Span] = spans, caches: list[torch.Tensor] = caches, query: torch.Tensor = query
        ) -> None:
            native.attend(spans, caches[turn % len(caches)], query, None)

        def library(
            turn: int, caches: list[torch.Tensor] = caches, query: torch.Tensor = query, kv: torch.Tensor = new_kv
        ) -> None:
            reference.attend(plan, caches[turn % len(caches)], query, kv[0], kv[1], None)  # noqa: B023  run at once

        num_bytes = 2 * batch * tokens * KV_HEADS * DIM * dtype.itemsize
        operations = 4 * batch * HEADS * DIM * sum(range(context + 1, tokens + 1))
        kind = f"decode {batch} x {context}" if new == 1 else f"prefill {new} after {context}"
        yield Row(f"attention {kind}", *in_turn(ours, library), roof.ms(num_bytes, operations))


if __name__ == "__main__":
    sys.exit(main())
