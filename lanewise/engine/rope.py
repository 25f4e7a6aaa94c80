"""Rotary position embedding: frequencies of each supported kind, and their use.

Owns: the formulas of default, llama3 and yarn scaling, bit for bit as `transformers` computes them.
Must not: read configuration files, or keep tables by position: angles are computed for the rows of each batch.
"""

from __future__ import annotations

import math

import torch

from lanewise.engine.model_config import Rope


class RotaryEmbedding:
    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        frequencies, self.scale = _frequencies(rope, head_dim)  # the scale is on cos and sin
        self.frequencies = frequencies.to(device)  # [head_dim / 2], radians per token

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [rows, 1, head_dim]; the first half of sin is negated for `rotate`."""
        angles = positions.float()[:, None] * self.frequencies  # [rows, head_dim / 2]
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin for heads [rows, heads, head_dim], with the sign of rotate_half in `sin`."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _frequencies(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians per token [head_dim / 2], and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, rope.theta**exponents, head_dim), _yarn_attention_factor(rope)
    return plain, 1.0


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / plain
    longest = rope.original_context_tokens / rope.low_freq_factor
    shortest = rope.original_context_tokens / rope.high_freq_factor
    stretched = torch.where(wavelengths > longest, plain / rope.factor, plain)
    blend = (rope.original_context_tokens / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * stretched / rope.factor + blend * stretched
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, stretched)


def _yarn(rope: Rope, periods: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Dimensions that turn often are kept, those that turn seldom are interpolated, with a ramp between."""

    def dimension(turns: float) -> float:
        per_turn = rope.original_context_tokens / (turns * 2 * math.pi)
        return (head_dim * math.log(per_turn)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return (1.0 / (rope.factor * periods)) * (1 - kept) + (1.0 / periods) * kept


def _yarn_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
