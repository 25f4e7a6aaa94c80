"""Tensor-parallel workers of two ranks over gloo: the same text, the same KV on the wire, none outlives the other."""

from __future__ import annotations

import os
import signal
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; the other ranks inherit it

from lanewise.engine import ranks as ranks_module
from lanewise.engine.runner import Engine, Work
from lanewise.engine.shard import Shard
from lanewise.errors import ConfigError
from lanewise.request import Sampling
from tests.engine.test_launch import run, sequences
from tests.engine.test_native import top_logprobs

GREEDY = Sampling(max_tokens=24, temperature=0.0)
FAMILIES = ["qwen2", "qwen2-window", "qwen3", "llama3"]  # mistral's test model has one KV head


@contextmanager
def two_ranks(load: Any, directory: Path, **settings: Any) -> Iterator[Engine]:
    engine = load(directory, tensor_parallel=2, threads=2, **settings)
    try:
        yield engine
    finally:
        engine.close()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in (1, 3, 64, 65, 200)]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_say_what_one_says(family, build_model, load, driver):
    directory, _ = build_model(family, vocab_size=509)  # an odd vocabulary: the second rank has less of it
    alone = load(directory, kernels="torch")
    ids = [[token % 509 for token in prompt] for prompt in prompts()]
    expected = driver().run(alone, driver().open(ids, GREEDY))
    with two_ranks(load, directory) as engine:
        assert driver(chunk_tokens=50).run(engine, driver().open(ids, GREEDY)) == expected
        assert engine.fingerprint == alone.fingerprint
        assert engine.pool.layout == alone.pool.layout


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"weights": "int8"}])
def test_other_forms_stay_near(settings, build_model, load, driver):
    directory, _ = build_model("qwen2")
    alone = top_logprobs(load(directory, kernels="torch", **settings), driver)
    with two_ranks(load, directory, **settings) as engine:
        together = top_logprobs(engine, driver)
    for left, right in zip(alone, together, strict=True):
        assert sum(abs(left[token] - right[token]) for token in range(512)) / 512 < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs")
def test_ranks_with_triton_kernels_say_the_same(build_model, load, driver):
    """Sums between fused phases; each layer's KV of both ranks is there when it is announced."""
    pytest.importorskip("triton")
    directory, _ = build_model("qwen3", vocab_size=509, head_dim=16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = load(directory, kernels="torch", device=device)
    few = Sampling(max_tokens=2, temperature=0.0)
    ids = [[token % 509 for token in prompt[:6]] for prompt in prompts()[1:3]]
    expected = driver().run(alone, driver().open(ids, few))
    with two_ranks(load, directory, kernels="triton", device=device) as engine:
        assert engine.kernels == "triton"
        assert driver(chunk_tokens=4).run(engine, driver().open(ids, few)) == expected
        assert driver().run(alone, [carried(engine, alone, ids[-1], driver, few)]) == expected[-1:]


def test_kv_travels_between_one_rank_and_two(build_model, load, driver):
    """The wire form is of all heads: what two ranks computed, one continues, and the other way round."""
    directory, _ = build_model("qwen3")
    alone = load(directory, kernels="torch")
    (prompt,) = prompts()[-1:]
    (expected,) = driver().run(alone, driver(key=b"0").open([prompt], GREEDY))
    with two_ranks(load, directory) as engine:
        for source, target in ((engine, alone), (alone, engine)):
            assert driver().run(target, [carried(source, target, prompt, driver)]) == [expected]


def carried(source: Engine, target: Engine, prompt: list[int], driver: Any, sampling: Sampling = GREEDY) -> Any:
    """A sequence in `target` whose prompt `source` computed: its KV went over the wire layer by layer."""
    (first,), (second,) = driver().open([prompt], sampling), driver().open([prompt], sampling)
    assert source.pool.ensure(first, len(prompt))
    assert target.pool.ensure(second, len(prompt))
    said: list[int] = []

    def on_layers(low: int, high: int) -> None:
        where = range(len(prompt)), range(low, high), range(source.pool.layout.num_kv_heads)
        target.pool.write(second.pages, *where, source.pool.read(first.pages, *where))
        said.append(high)

    (sampled,) = source.step([Work(first, len(prompt))], on_layers)
    assert said == [1, 2, 3]
    assert sampled is not None
    second.ids.append(sampled.token_id)
    second.num_computed = len(prompt)
    source.pool.release(first)
    return second


def test_the_end_of_a_rank_is_noticed(build_model, load, monkeypatch):
    lost, noticed = [], threading.Event()

    def on_lost(reason: str) -> None:
        lost.append(reason)
        noticed.set()

    monkeypatch.setattr(ranks_module, "_end_worker", on_lost)
    with two_ranks(load, build_model("qwen2")[0]) as engine:
        (process,) = engine._ranks._processes
        os.kill(process.pid, signal.SIGKILL)
        assert noticed.wait(20)
        assert lost == ["rank 1 of 2 ended with status -9"]
        engine.close()


def test_a_closed_engine_leaves_no_rank(build_model, load):
    with two_ranks(load, build_model("qwen2")[0]) as engine:
        (process,) = engine._ranks._processes
        assert process.poll() is None
    assert process.returncode is not None
    deadline = time.monotonic() + 5
    while any(thread.name == "rank-1" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("family", "changes", "settings", "message"),
    [
        ("mistral", {}, {}, "num_kv_heads 1 is no multiple"),
        ("qwen2", {"intermediate_size": 97}, {}, "intermediate_size 97"),
        ("qwen2", {}, {"kernels": "native"}, "kernels: native serves one rank"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(family, changes, settings, message, build_model, load):
    with pytest.raises(ConfigError, match=message):
        load(build_model(family, **changes)[0], tensor_parallel=2, **settings)


def test_every_tensor_is_split_exactly_once():
    weight, bias = torch.arange(48.0).view(8, 6), torch.arange(8.0)
    shards = [Shard(rank, 2) for rank in range(2)]
    layer = "model.layers.0."

    def parts(name: str, tensor: torch.Tensor) -> list[torch.Tensor | None]:
        return [shard.part(name, tensor) for shard in shards]

    assert torch.equal(torch.cat(parts(layer + "mlp.gate_proj.weight", weight)), weight)
    assert torch.equal(torch.cat(parts(layer + "self_attn.q_proj.bias", bias)), bias)
    assert torch.equal(torch.cat(parts(layer + "mlp.down_proj.weight", weight), 1), weight)
    assert parts(layer + "self_attn.o_proj.bias", bias)[1] is None
    assert torch.equal(torch.cat(parts("lm_head.weight", weight[:7])), weight[:7])
    assert all(torch.equal(part, bias) for part in parts(layer + "input_layernorm.weight", bias))
    assert array("i", shards[1].vocabulary(7)).tolist() == [4, 5, 6]


def test_ranks_take_the_ids_that_rank_0_has_sampled(build_model, load):
    """A launch ahead: the other ranks learn the ids from rank 0's device, not from its host."""
    directory, _ = build_model("qwen2", vocab_size=509)
    plain = run(load(directory, kernels="torch"), sequences_of(509), False)
    with two_ranks(load, directory) as engine:
        ahead = run(engine, sequences_of(509), True)
    assert [[token.token_id for token in said] for said in ahead] == [
        [token.token_id for token in said] for said in plain
    ]


def sequences_of(vocab: int) -> list[Any]:
    seqs = sequences(4)
    for seq in seqs:
        seq.ids = [token % vocab for token in seq.ids]
    return seqs
