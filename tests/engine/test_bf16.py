"""How often bf16 rounding lets a continuation depend on the batch; fp32 equality is tested in test_greedy.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lanewise.engine import native_model
from lanewise.engine.runner import Work
from lanewise.request import Sampling
from tests.engine.test_native import needs
from tests.kernels.emulated import EMULATED

GREEDY = Sampling(max_tokens=32, temperature=0.0)
NEAR = 0.25
"""Log probabilities this close are within rounding: logits of 4 to 8 are 0.03 apart in bf16, and layers add up."""


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@pytest.mark.parametrize("kernels", ["auto", "torch", "emulated tiles"])
def test_continuations_differ_only_where_the_best_two_are_near(
    family, kernels, build_model, load, driver, record_property, monkeypatch
):
    if kernels == "emulated tiles":
        needs(EMULATED)
        monkeypatch.setattr(native_model, "available", lambda: EMULATED)
        kernels = "native"
    engine = load(build_model(family)[0], dtype="bfloat16", kernels=kernels)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in range(5, 400, 33)]
    alone, together = driver(chunk_tokens=1000, concurrency=1, key=b"1"), driver(chunk_tokens=37, key=b"2")
    first = alone.run(engine, alone.open(prompts, GREEDY))
    second = together.run(engine, together.open(prompts, GREEDY))
    parted = 0
    for prompt, left, right in zip(prompts, first, second, strict=True):
        common = next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)
        if common is None:
            continue
        parted += 1
        (seq,) = alone.open([prompt + left[:common]], replace(GREEDY, logprobs=8))
        assert engine.pool.ensure(seq, len(seq.ids))
        (sampled,) = engine.step([Work(seq, len(seq.ids))])
        engine.pool.release(seq)
        logprobs = dict(sampled.top)
        assert abs(logprobs[left[common]] - logprobs[right[common]]) < NEAR
    tokens = sum(map(len, first))
    print(f"\n{family}: {parted} of {len(prompts)} continuations of {tokens} tokens part in bf16")
    record_property("parted", parted)
    # The native kernels add in one order whatever the batch and the chunks: there not one continuation may part.
    assert parted <= (0 if engine.kernels.startswith("native") else len(prompts) // 2)


def test_bf16_stays_near_fp32(build_model, load, driver):
    """The first token's log probabilities, against fp32 with the same weights."""
    directory, _ = build_model("qwen3")
    prompt = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(4)).tolist()
    tops = []
    for dtype in ("float32", "bfloat16"):
        engine = load(directory, dtype=dtype)
        (seq,) = driver().open([prompt], replace(GREEDY, logprobs=512))
        assert engine.pool.ensure(seq, 200)
        engine.step([Work(seq, 150)])
        (sampled,) = engine.step([Work(seq, 50)])
        tops.append(dict(sampled.top))
    difference = torch.tensor([tops[0][token] - tops[1][token] for token in range(512)])
    assert difference.abs().mean() < 0.1
