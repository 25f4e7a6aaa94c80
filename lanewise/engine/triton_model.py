"""The decoder through the Triton kernels: products stay the library's, everything between them is fused.

Owns: the order of the fused phases. Must not: be imported without need (Triton decides at import how it runs).
It was tested in Triton's interpreter and not yet run on a GPU, so it has to be asked for: `kernels: triton`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn.functional import silu

from lanewise.engine.model import Decoder, OnLayers
from lanewise.engine.model_config import ModelConfig
from lanewise.engine.quantise import Linear, apply
from lanewise.engine.weights import LayerWeights, Weights
from lanewise.kernels.select import Attention
from lanewise.kernels.triton_attention import TritonAttention
from lanewise.kernels.triton_bytes import bytes_product
from lanewise.kernels.triton_rows import add_norm, rotate_and_write


class TritonDecoder(Decoder):
    """As `Decoder`; N rows, H heads, G key-value heads, D head_dim."""

    kernels = "triton"

    def __init__(
        self, config: ModelConfig, weights: Weights, attention: TritonAttention, cache: list[torch.Tensor]
    ) -> None:
        super().__init__(config, weights, cast(Attention, attention), cache)  # of which `run` only plans
        self._kernels = attention

    def _forward(self, ids: torch.Tensor, plan: Any, on_layers: OnLayers | None) -> torch.Tensor:
        hidden = self.embed(ids)  # [N, hidden]
        cos, sin = self.angles(plan.positions)
        update: torch.Tensor | None = None
        for index in range(len(self.weights.layers)):
            query = self.before_attention(index, hidden, update, plan.slots, cos, sin)
            if on_layers is not None and not self.across_ranks:
                on_layers(index, index + 1)
            update = self.after_attention(index, hidden, self.attend(index, plan, query))
            if on_layers is not None and self.across_ranks:  # a sum is over: the others have written their KV too
                on_layers(index, index + 1)
        return hidden if update is None else hidden + update

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [N, D / 2]."""
        cos, sin = self.rope.angles(positions, self.weights.norm.dtype)  # [N, 1, D]
        half = self.config.head_dim // 2
        return cos[:, 0, half:], sin[:, 0, half:]

    def before_attention(
        self,
        index: int,
        hidden: torch.Tensor,
        update: torch.Tensor | None,
        slots: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query [N, H, D] of layer `index`, into `query` if given; KV goes to its slots, `hidden` takes `update`."""
        layer, eps = self.weights.layers[index], self.config.rms_norm_eps
        qkv = self._inputs(layer, add_norm(hidden, update, layer.attention_norm, eps))
        norms = None if layer.query_norm is None or layer.key_norm is None else (layer.query_norm, layer.key_norm)
        return rotate_and_write(qkv, self.cache[index], slots, cos, sin, norms, eps, query)

    def attend(self, index: int, plan: Any, query: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Attention [N, H, D] of layer `index`, into `out` if given."""
        return self._kernels.attend(plan, self.cache[index], query, self.config.windows[index], out)

    def after_attention(self, index: int, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """What layer `index` adds to `hidden` last: the next norm adds it on its way."""
        layer = self.weights.layers[index]
        update = self.total(product(layer.output, mixed.flatten(1)))
        inner = add_norm(hidden, update, layer.mlp_norm, self.config.rms_norm_eps)
        return self.total(product(layer.down, silu(product(layer.gate, inner)) * product(layer.up, inner)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return product(self.weights.head, self._norm(hidden, self.weights.norm)).float()

    def _inputs(self, layer: LayerWeights, normed: torch.Tensor) -> torch.Tensor:
        """[N, H + 2 G, D]: query, key and value heads."""
        parts = [product(part, normed) for part in (layer.query, layer.key, layer.value)]
        return torch.cat(parts, 1).view(len(normed), -1, self.config.head_dim)


def product(layer: Linear, rows: torch.Tensor) -> torch.Tensor:
    """As `quantise.apply`; what the library has no product for is done by a kernel of ours where there is one."""
    if layer.scales is None or layer.rounded_rows or layer.weight.dtype != torch.int8:
        return apply(layer, rows)
    return bytes_product(rows, layer.weight, layer.scales, layer.bias)
