"""Weights in one byte, and products with them: the meaning of `--weights`, and its reference in torch operations.

Owns: rounding a weight to int8 or e4m3 with one scale for each output, rounding activations to int8 with one step for
each row, and the product of both. Must not: know models or choose kernels; faster ones must agree with `apply`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

FORMS = ("full", "int8", "fp8", "w8a8")
"""full: the compute dtype. w8a8: int8, and rows are rounded to int8 before each product but the last (the head)."""
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(slots=True)
class Linear:
    """`weight` is [out, in]: of the compute dtype, or of one byte a value where `scales` [out] (fp32) are there."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    rounded_rows: bool = False  # activations become int8 too


def quantise(layer: Linear, form: str, *, rounded_rows: bool = True) -> Linear:
    """The layer in `form`, on its device; `rounded_rows` False keeps activations whole in w8a8."""
    if form == "full":
        return layer
    dtype = torch.float8_e4m3fn if form == "fp8" else torch.int8
    wide = layer.weight.float()
    most = wide.abs().amax(1)
    scales = torch.where(most > 0, most / _LARGEST[dtype], 1.0)
    wide = wide / scales[:, None]
    weight = (wide.round_() if dtype == torch.int8 else wide).to(dtype)
    return Linear(weight, layer.bias, scales, form == "w8a8" and rounded_rows)


def apply(layer: Linear, rows: torch.Tensor) -> torch.Tensor:
    """rows [n, in] @ weight.T + bias as [n, out] in the dtype of the rows."""
    if layer.scales is None:
        return linear(rows, layer.weight, layer.bias)
    if layer.rounded_rows:
        wide = rows.float()
        steps = wide.abs().amax(1, keepdim=True) / 127.0
        rounded = torch.where(steps > 0, (wide / steps).round_(), 0.0)
        sums = linear(rounded, layer.weight.float()) * steps
    else:
        sums = linear(rows, layer.weight.to(rows.dtype)).float()
    sums = sums * layer.scales
    return (sums if layer.bias is None else sums + layer.bias.float()).to(rows.dtype)


def as_bytes(weight: torch.Tensor) -> torch.Tensor:
    """A view whose values can be moved about: few operations take fp8."""
    return weight.view(torch.int8) if weight.dtype == torch.float8_e4m3fn else weight
