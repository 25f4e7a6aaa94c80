"""benchmarks/gpu.py without a GPU: its checkpoint, the engine's part, its verdicts; all of it as a long test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import lmsys
from benchmarks.gpu_engine import attention_operations, measure, product_operations
from benchmarks.gpu_models import SHAPES, make_model
from benchmarks.gpu_table import table
from lanewise.engine.checkpoint import Checkpoint
from lanewise.engine.model_config import read_model_config
from lanewise.engine.weights import expected_shapes

ROOT = Path(__file__).parents[2]


def test_the_engine_measures_a_made_up_model(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    make_model(tmp_path, shape)
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.entries) == {name for name, _ in expected_shapes(read_model_config(tmp_path))}
    assert (tmp_path / "model.safetensors").stat().st_size < checkpoint.num_bytes  # layers share their bytes
    found = measure(tmp_path, shape, "cpu", "torch")
    assert found["kernels"] == "torch"
    assert 0 < found["prefill_products_share"] < found["prefill_share"]
    assert min(found["decode_step_ms"], found["prefill_ms"], found["product_ms"]) > 0


def test_operations_are_those_of_the_published_shapes() -> None:
    """Two for each weight of the layers and token: 31.2 B and 6.53 B without embedding, head and biases."""
    for name, billions in (("32b", 31.2), ("7b", 6.53)):
        assert product_operations(SHAPES[name], 1) / 2e9 == pytest.approx(billions, rel=0.01)
    assert SHAPES["32b"].token_bytes == 256 << 10
    assert SHAPES["7b"].token_bytes == 56 << 10
    # Two products of 4 tokens with those up to themselves: 10 pairs of 2 operations a value.
    assert attention_operations(SHAPES["tiny"], 4) == 2 * 2 * 10 * 2 * 4 * 16


def test_prompts_have_lmsys_lengths_in_an_order_of_their_own() -> None:
    one, two = lmsys(1000, 500, seed=1), lmsys(1000, 500, seed=2)
    assert [ask.prompt_tokens for ask in one] != [ask.prompt_tokens for ask in two]
    assert all(1 <= ask.prompt_tokens <= 500 and ask.output_tokens == 1 for ask in one)
    assert 60 < sum(ask.prompt_tokens for ask in lmsys(10_000, 10**6, seed=1)) / 10_000 < 300


def served(rate: float, ttft_ms: float) -> dict[str, Any]:
    spread = {"p50": ttft_ms, "p99": 2 * ttft_ms}
    return {
        "request_rate": rate,
        "ttft_ms": spread,
        "server_ttft_ms": ttft_ms - 1,
        "gap_ms": spread,
        "second_token_ms": spread,
        "output_tokens_per_s": 16 * rate,
    }


def test_the_table_says_what_was_met() -> None:
    engine = {
        "device": "a GPU", "torch": "2", "kernels": "triton, graphs", "decode_step_ms": 26.0, "product_ms": 1.5,
        "product_tflops": 733.0, "prefill_ms": 900.0, "prefill_products_share": 0.56, "prefill_share": 0.61,
    }  # fmt: skip
    found = {
        "32b": {
            "engine": engine,
            "serve": {
                "fcfs": {"1": served(30.0, 25.0), "128": served(300.0, 300.0)},
                "lanewise": {"1": served(40.0, 22.5), "128": served(290.0, 260.0)},
            },
            "split": {
                "together": {"prompts": 9, "kv_transfers": 0.0, "1": served(5.0, 100.0)},
                "split": {"prompts": 9, "kv_transfers": 9.0, "1": served(4.0, 110.0)},
            },
        }
    }
    lines = table(json.loads(json.dumps(found))).splitlines()

    def line(start: str) -> str:
        return next(line for line in lines if line.startswith(start))

    assert line("| decode step, 32 × 2048").endswith("26.00 ms | ≤ 25 ms | **missed** |")
    assert line("| its products alone").endswith("56.0% | ≥ 55% | met |")
    assert line("| 1 |").endswith("1.33 ×, met |")
    assert line("| 128 |").endswith("0.97 ×, **missed** |")
    assert line("- cold TTFT").endswith("21.5 ms (wanted ≤ 22 ms: met)")
    assert line("- median TTFT").endswith("260.0 ms (wanted ≤ 259 ms: **missed**)")
    assert line("| TTFT p50, clients: 1").endswith("+10.0 ms |")
    assert line("The KV of") == "The KV of 9 of 9 prompts travelled between the two processes."


@pytest.mark.slow
@pytest.mark.e2e
def test_all_of_its_way_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "tiny.json"
    command = [sys.executable, "benchmarks/gpu.py", "--shape", "tiny", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["tiny"]
    assert set(found) == {"engine", "serve", "split"}
    assert found["split"]["split"]["kv_transfers"] > 0
    assert done.stdout.endswith(table({"tiny": found}) + "\n")
