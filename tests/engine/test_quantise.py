"""Weights of one byte: how much they change, native kernels against torch, and that nobody mixes them up."""

from __future__ import annotations

import pytest
import torch

from lanewise.engine.quantise import FORMS, Linear, apply, quantise
from tests.engine.conftest import native_kernels
from tests.engine.test_native import top_logprobs

BYTES = [form for form in FORMS if form != "full"]
FARTHEST = {"int8": 0.08, "fp8": 0.6, "w8a8": 0.25}
"""Mean difference of log probabilities of a random model whose weights are far larger than a trained one's."""


@pytest.mark.parametrize(("form", "limit"), [("int8", 0.006), ("fp8", 0.04), ("w8a8", 0.012)])
def test_a_product_changes_by_little(form, limit):
    generator = torch.Generator().manual_seed(1)
    weight, rows = torch.randn(64, 512, generator=generator), torch.randn(9, 512, generator=generator)
    weight[3] *= 1000  # one loud output takes nothing from the others
    weight[5] = 0
    expected = rows @ weight.T
    found = apply(quantise(Linear(weight), form), rows)
    assert torch.equal(found[:, 5], torch.zeros(9))
    error = (found - expected).norm(dim=0) / expected.norm(dim=0).clamp(min=1e-9)
    assert 0 < error.max() < limit * 5
    assert error.median() < limit * 1.5


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_models_stay_near_whole_weights(form, family, build_model, load, driver):
    directory, _ = build_model(family, intermediate_size=88)
    whole = as_tensor(top_logprobs(load(directory, kernels="torch"), driver))
    found = as_tensor(top_logprobs(load(directory, kernels="torch", weights=form), driver))
    assert 1e-4 < (found - whole).abs().mean() < FARTHEST[form]


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_kernels_agree_with_torch(form, dtype, build_model, load, driver):
    if not native_kernels():
        pytest.skip("no native kernels on this machine")
    directory, _ = build_model("qwen3", intermediate_size=88, head_dim=48, num_attention_heads=6)
    expected = as_tensor(top_logprobs(load(directory, dtype="float32", kernels="torch", weights=form), driver))
    engine = load(directory, dtype=dtype, weights=form)
    assert engine.kernels.startswith("native")
    difference = (as_tensor(top_logprobs(engine, driver)) - expected).abs().mean()
    # A rounding of activations that falls the other way moves a whole step, so w8a8 is less exact in fp32.
    assert difference < (0.15 if dtype == "bfloat16" else 0.02 if form == "w8a8" else 5e-5)
    assert top_logprobs(engine, driver, chunk_tokens=7) == top_logprobs(
        load(directory, dtype=dtype, weights=form), driver
    )


def test_kv_of_other_weights_is_refused(build_model, load):
    directory, _ = build_model("qwen2")
    found = {form: load(directory, weights=form) for form in FORMS}
    assert len({engine.fingerprint for engine in found.values()}) == len(FORMS)
    digest = found["full"].fingerprint_fields["weight_digest"]
    assert found["int8"].fingerprint_fields == {
        **found["full"].fingerprint_fields,
        "weight_digest": f"{digest} as int8",
    }


def as_tensor(tops: list[dict[int, float]]) -> torch.Tensor:
    return torch.tensor([[top[token] for token in range(512)] for top in tops])


def test_a_start_says_where_its_time_went(build_model, load):
    engine = load(build_model("qwen2")[0])
    engine.warm_up()
    assert list(engine.startup_s) == ["import", "open", "load", "pack", "warm"]
    assert engine.startup_s["import"] > 0.1  # the age of this process, which may have tested for an hour
    assert all(0 <= seconds < 100 for name, seconds in engine.startup_s.items() if name != "import")
