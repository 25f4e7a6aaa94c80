"""config.json: both spellings of rope, family defaults, and refusals by name."""

from __future__ import annotations

import json

import pytest
import torch

from lanewise.engine.model_config import read_model_config
from lanewise.engine.rope import RotaryEmbedding
from lanewise.errors import ConfigError

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
}


@pytest.fixture
def read(tmp_path):
    def read_config(changes, base=QWEN2):
        (tmp_path / "config.json").write_text(json.dumps({**base, **changes}))
        return read_model_config(tmp_path)

    return read_config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"architectures": None, "model_type": "gemma"}, "model_type 'gemma'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantisation 'awq' is not supported"),
        ({"compression_config": {"quant_method": "sparse"}}, "quantisation 'sparse'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 3},
            "chunked_attention",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(read, changes, words):
    with pytest.raises(ConfigError, match=words):
        read(changes)


def test_missing_and_damaged_files(read, tmp_path):
    with pytest.raises(ConfigError, match="has no 'vocab_size'"):
        read({}, {key: value for key, value in QWEN2.items() if key != "vocab_size"})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        read_model_config(tmp_path)


def test_old_and_new_rope_spelling_mean_the_same(read):
    scaling = {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": None}
    old = read({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **scaling}})
    new = read({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **scaling}})
    assert old == new
    assert old.max_context_tokens == 4096


def test_windows_by_layer(read):
    assert read({"sliding_window": 8}).windows == (None,) * 3
    assert read({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}).windows == (None, None, 8)
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read({**mistral, "sliding_window": 8}).windows == (8,) * 3
    assert read({**mistral, "sliding_window": None}).windows == (None,) * 3


def test_every_eos_id_of_both_files_counts(read, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert read({"eos_token_id": 3}).eos_ids == {2, 3, 9}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.1},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    ],
)
def test_frequencies_are_those_of_transformers(read, parameters):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**parameters, "rope_theta": 50_000.0}
    if parameters["rope_type"] != "default":
        parameters["original_max_position_embeddings"] = 256
    sizes = {key: value for key, value in QWEN2.items() if key != "architectures"}
    config = read({"rope_parameters": dict(parameters), "head_dim": 32})
    oracle = LlamaRotaryEmbedding(LlamaConfig(**sizes, head_dim=32, rope_parameters=dict(parameters)))
    positions = torch.tensor([0, 1, 7, 300, 1023])
    cos, sin = RotaryEmbedding(config.rope, 32, torch.device("cpu")).angles(positions, torch.float32)
    expected_cos, expected_sin = oracle(torch.zeros(1), positions[None])
    assert torch.equal(cos[:, 0], expected_cos[0])
    assert torch.equal(sin[:, 0].abs(), expected_sin[0].abs())
