"""The whole decoder of every supported family, over a ragged batch of tokens.

Owns: the forward pass from token ids to hidden states and logits. N is the number of rows (new tokens of all sequences,
one after the other), H heads, G key-value heads, D head_dim.
Must not: know sequences, sampling or page bookkeeping. Norms compute in fp32 and round where `transformers` rounds, so
that greedy output in fp32 equals its output token for token.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch.nn.functional import rms_norm, silu

from lanewise.engine.carried import Carried
from lanewise.engine.model_config import ModelConfig
from lanewise.engine.quantise import apply
from lanewise.engine.rope import RotaryEmbedding, rotate
from lanewise.engine.weights import LayerWeights, Weights
from lanewise.kernels.copies import upload
from lanewise.kernels.plan import BatchPlan, Span
from lanewise.kernels.select import Attention

OnLayers = Callable[[int, int], None]


class Decoder:
    """The decoder in torch operations, on any device; `cache` is the KV of each layer."""

    kernels = "torch"
    across_ranks = False

    def __init__(self, config: ModelConfig, weights: Weights, attention: Attention, cache: list[torch.Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.attention = attention
        self.cache = cache
        self.rope = RotaryEmbedding(config.rope, config.head_dim, weights.embedding.device)

    def run(
        self,
        spans: Seq[Span],
        ids: Seq[Seq[int]],
        sampled: Seq[bool],
        on_layers: OnLayers | None = None,
        carried: Carried | None = None,
    ) -> torch.Tensor | None:
        """Computes the new tokens `ids` of each span; those of `carried` lie on the device.

        Logits [wanted, vocab] in fp32 of the spans whose next token is wanted, in their order; None where none is.
        `on_layers(lo, hi)` is called when the KV of these layers is in the cache.
        """
        plan = self.attention.plan(spans)
        rows = upload([token for index in plan.order for token in ids[index]], plan.positions.device)
        ends = dict(zip(plan.order, plan.ends, strict=True))
        if carried is not None:
            carried.put(self.carry(carried), rows, ends)
        hidden = self._forward(rows, plan, on_layers)
        wanted = [ends[index] - 1 for index, flag in enumerate(sampled) if flag]
        return self.logits(hidden[upload(wanted, rows.device)]) if wanted else None

    def _forward(self, ids: torch.Tensor, plan: BatchPlan, on_layers: OnLayers | None) -> torch.Tensor:
        """Hidden states [N, hidden] before the last norm."""
        cache = self.cache
        hidden = self.embed(ids)  # [N, hidden]
        cos, sin = self.rope.angles(plan.positions, hidden.dtype)  # [N, 1, D]
        for index, layer in enumerate(self.weights.layers):
            query, key, value = self._project(layer, self._norm(hidden, layer.attention_norm))
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            self.attention.write(plan, cache[index], key, value)
            mixed = self.attention.attend(
                plan, cache[index], query, key, value, self.config.windows[index]
            )  # [N, H, D]
            hidden = hidden + self.total(apply(layer.output, mixed.reshape(len(hidden), -1)))
            if on_layers is not None:  # after a sum over all ranks, if there are any: so their KV is written too
                on_layers(index, index + 1)
            inner = self._norm(hidden, layer.mlp_norm)
            hidden = hidden + self.total(apply(layer.down, silu(apply(layer.gate, inner)) * apply(layer.up, inner)))
        return hidden

    def carry(self, carried: Carried) -> torch.Tensor:
        """The ids that the launch before sampled, on this rank."""
        return carried.ids()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[N, hidden] in the compute dtype."""
        return self.weights.embedding[ids].to(self.weights.norm.dtype)

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """What this rank adds to the residual stream [N, hidden], summed over all ranks: here there is one."""
        return part

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] in fp32 for the rows that are sampled."""
        return apply(self.weights.head, self._norm(hidden, self.weights.norm)).float()

    def _project(self, layer: LayerWeights, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [N, H, D], key and value [N, G, D], before rotation."""
        dim = self.config.head_dim
        query = apply(layer.query, hidden).view(len(hidden), -1, dim)
        key = apply(layer.key, hidden).view(len(hidden), -1, dim)
        value = apply(layer.value, hidden).view(len(hidden), -1, dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
        return query, key, value

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension: statistics in fp32, rounded to the compute dtype before the weight."""
        eps = self.config.rms_norm_eps
        if hidden.dtype == torch.float32:
            return rms_norm(hidden, (hidden.shape[-1],), weight, eps)
        return weight * rms_norm(hidden.float(), (hidden.shape[-1],), None, eps).to(hidden.dtype)
