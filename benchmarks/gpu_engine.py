"""The engine alone, in one process: a decode step, a long prefill, and a plain product on the same device.

    python benchmarks/gpu_engine.py MODEL_DIR --shape 32b [--device cuda] [--kernels triton]

Prints one JSON object. benchmarks/gpu.py starts it so, since a process gives a GPU's memory back only when it ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_models import SHAPES, Shape
from benchmarks.weights import step_s
from lanewise.config import WorkerConfig
from lanewise.engine.runner import Engine

WARM_RUNS = 3
SPARE_TOKENS = 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", default="triton")
    options = parser.parse_args()
    print(json.dumps(measure(options.model, SHAPES[options.shape], options.device, options.kernels)))
    return 0


def measure(model: Path, shape: Shape, device: str, kernels: str) -> dict[str, Any]:
    count, context = shape.decode
    tokens = max(count * (context + 64), shape.prefill_tokens) + SPARE_TOKENS
    config = WorkerConfig(
        model=str(model),
        device=device,
        kernels=kernels,
        dtype="bfloat16",
        max_context_tokens=shape.context_tokens,
        max_batch_tokens=shape.prefill_tokens,
        max_running=max(count, 8),
        kv_cache_bytes=tokens * shape.token_bytes,
    )
    started = time.perf_counter()
    engine = Engine.load(config)
    load_s = time.perf_counter() - started
    decode = _median(lambda: step_s(engine, count, context, 1, clock=time.perf_counter), shape.repeats)
    # The product takes turns with the prefill: a device that gets hot slows both.
    products, prefills = [], []
    for _ in range(3):
        products.append(_median(lambda: _product_s(shape.product, engine.pool.device), shape.repeats))
        prefills.append(
            _median(lambda: step_s(engine, 1, 0, shape.prefill_tokens, clock=time.perf_counter), shape.repeats // 3)
        )
    product, prefill = statistics.median(products), statistics.median(prefills)
    rate = 2 * shape.product**3 / product
    return {
        "device": torch.cuda.get_device_name() if engine.pool.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "kernels": engine.kernels,
        "load_s": load_s,
        "decode_step_ms": 1e3 * decode,
        "prefill_ms": 1e3 * prefill,
        "product_ms": 1e3 * product,
        "product_tflops": rate / 1e12,
        "prefill_products_share": product_operations(shape, shape.prefill_tokens) / prefill / rate,
        "prefill_share": (
            (product_operations(shape, shape.prefill_tokens) + attention_operations(shape, shape.prefill_tokens))
            / prefill
            / rate
        ),
    }


def product_operations(shape: Shape, tokens: int) -> float:
    """Of all products of the layers; the head multiplies one row, which is left out."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = shape.hidden * (2 * query + 2 * key_value + 3 * shape.inner)
    return 2.0 * shape.layers * weights * tokens


def attention_operations(shape: Shape, tokens: int) -> float:
    """Of a prompt without context: each token and those before it, keys and values."""
    return 2.0 * shape.layers * shape.heads * shape.head_dim * tokens * (tokens + 1)


def _product_s(side: int, device: torch.device) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.matmul(left, right)
    _wait(device)
    started = time.perf_counter()
    torch.matmul(left, right)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(once: Callable[[], float], repeats: int) -> float:
    for _ in range(WARM_RUNS):
        once()
    return statistics.median(once() for _ in range(max(1, repeats)))


if __name__ == "__main__":
    sys.exit(main())
