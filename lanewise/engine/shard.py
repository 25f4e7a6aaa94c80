"""Which part of a model one rank of a tensor-parallel worker holds.

Owns: the split of heads, inner size and vocabulary, and of each tensor by its name. Must not: load or communicate.
Products into heads and the inner size are split by output, those out of them by input: one sum over the ranks after
each pair. Embedding and head are split by vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lanewise.engine.model_config import ModelConfig
from lanewise.errors import ConfigError

BY_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
BY_OUTPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_INPUT = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The model as this rank computes it; ConfigError where it cannot be divided evenly."""
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            if (count := getattr(whole, name)) % self.size:
                raise ConfigError(f"tensor_parallel {self.size}: {name} {count} is no multiple of it")
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=whole.num_kv_heads // self.size,
            intermediate_size=whole.intermediate_size // self.size,
        )

    def vocabulary(self, size: int) -> range:
        """The ids whose embedding and logits are here; the last rank may have fewer."""
        each = -(-size // self.size)
        return range(min(size, self.rank * each), min(size, (self.rank + 1) * each))

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """What of the tensor `name` of the checkpoint is held here: a view; None: nothing."""
        if self.size == 1:
            return tensor
        if name in BY_VOCABULARY:
            ids = self.vocabulary(len(tensor))
            return tensor[ids.start : ids.stop]
        module, _, kind = name.rpartition(".")
        if module.endswith(BY_OUTPUT):
            return self._slice(tensor, 0)
        if module.endswith(BY_INPUT):
            if kind == "bias":  # added once, where the sum of the ranks begins
                return tensor if self.rank == 0 else None
            return self._slice(tensor, 1)
        return tensor

    def _slice(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        each = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * each, each)
