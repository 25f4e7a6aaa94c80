"""What a checkpoint's config.json means: one frozen record for all supported families.

Owns: reading config.json and generation_config.json, the defaults of each family, and refusing by name whatever the
engine does not implement. Must not: read weights or import torch; model.py must not look at the raw file again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lanewise.errors import ConfigError

FAMILIES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}
ROPE_TYPES = ("default", "llama3", "yarn")
ROPE_OPTIONS = (
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding; fields after `theta` are read only by the kinds that scale."""

    kind: str  # one of ROPE_TYPES
    theta: float
    factor: float = 1.0
    original_context_tokens: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float | None = None  # yarn; None: from factor and the two below
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of any supported family."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_context_tokens: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # per layer: how many of the last tokens it sees, itself included; None: all
    eos_ids: frozenset[int]


def read_model_config(directory: Path) -> ModelConfig:
    """The record, or ConfigError naming what is missing or not supported."""
    raw = read_json(directory / "config.json")
    try:
        return _interpret(raw, _eos_ids(directory, raw))
    except KeyError as error:
        raise ConfigError(f"{directory / 'config.json'} has no {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _interpret(raw: Mapping[str, Any], eos_ids: frozenset[int]) -> ModelConfig:
    family = _family(raw)
    if raw.get("quantization_config") or raw.get("compression_config"):
        quant = raw.get("quantization_config") or raw["compression_config"]
        name = quant.get("quant_method", "unnamed") if isinstance(quant, dict) else str(quant)
        raise ConfigError(f"quantisation {name!r} is not supported; use the unquantised checkpoint")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"activation {raw['hidden_act']!r} is not supported (only silu)")
    num_heads: int = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // num_heads)
    num_kv_heads = raw.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ConfigError(f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads")
    rope, max_context_tokens = _rope(raw)
    attention_bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3")
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=rope,
        max_context_tokens=max_context_tokens,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        windows=_windows(raw, family),
        eos_ids=eos_ids,
    )


def _family(raw: Mapping[str, Any]) -> str:
    architectures = raw.get("architectures") or []
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name]
    known = ", ".join(FAMILIES)
    named = ", ".join(map(str, architectures)) or f"none given, model_type {raw.get('model_type')!r}"
    raise ConfigError(f"architecture {named} is not supported; supported are {known}")


def _windows(raw: Mapping[str, Any], family: str) -> tuple[int | None, ...]:
    num_layers: int = raw["num_hidden_layers"]
    window = raw.get("sliding_window", 4096)  # what transformers takes where the key is absent
    if family == "llama" or window is None:
        return (None,) * num_layers
    if family == "mistral":
        return (window,) * num_layers
    if not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if len(kinds) != num_layers or (unknown := set(kinds) - {"sliding_attention", "full_attention"}):
        raise ConfigError(f"layer_types {sorted(unknown) if len(kinds) == num_layers else len(kinds)} not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(raw: Mapping[str, Any]) -> tuple[Rope, int]:
    """Rotary parameters in the new (`rope_parameters`) or old (`rope_scaling`, `rope_theta`) form; context limit."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError("rope parameters that differ by layer type are not supported")
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor {partial} is not supported")
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    limit: int = raw["max_position_embeddings"]
    if kind == "default":
        return Rope(kind, theta), limit
    original = int(
        raw.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings") or limit
    )
    factor = float(parameters.get("factor") or limit / original)
    optional = {name: parameters[name] for name in ROPE_OPTIONS if parameters.get(name) is not None}
    rope = Rope(kind, theta, factor=factor, original_context_tokens=original, **optional)
    # Some yarn checkpoints state the context before scaling, some after; llama3 ones always state it after.
    return rope, max(limit, int(original * factor)) if kind == "yarn" else limit


def _eos_ids(directory: Path, raw: Mapping[str, Any]) -> frozenset[int]:
    """Every id that either file calls an end of sequence: chat models name one in the first and more in the second."""
    sources = [raw]
    if (directory / "generation_config.json").is_file():
        sources.append(read_json(directory / "generation_config.json"))
    found: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)
