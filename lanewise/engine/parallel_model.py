"""The decoder of one rank of a tensor-parallel worker: it computes on its shard, with sums and gathers over the ranks.

Owns: where ranks communicate. Must not: know who started whom (ranks.py, follower.py). Every rank must run the same
batches in the same order; only rank 0 gets logits.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from lanewise.engine.assemble import Opened, triton_attention
from lanewise.engine.carried import Carried
from lanewise.engine.kv_pool import KVPool
from lanewise.engine.model import Decoder
from lanewise.engine.model_config import ModelConfig
from lanewise.engine.shard import Shard
from lanewise.engine.weights import Weights
from lanewise.kernels.select import select_attention

COLLECTIVE_S = 120.0  # a rank that does not come for this long has hung


def open_store(size: int, port: int = 0) -> Any:
    """Where ranks find each other: rank 0 opens it at a port that it finds, the others at that port."""
    timeout = timedelta(seconds=COLLECTIVE_S)
    return dist.TCPStore("127.0.0.1", port, size, port == 0, timeout, wait_for_workers=False)  # type: ignore[attr-defined]


def join(shard: Shard, store: Any, device: torch.device) -> None:
    """Makes this process a rank; returns when all have come, RuntimeError when one does not."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks share a machine, and its name may not resolve
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    timeout = timedelta(seconds=COLLECTIVE_S)
    dist.init_process_group(backend, store=store, rank=shard.rank, world_size=shard.size, timeout=timeout)


class ParallelDecoder(Decoder):
    """As `Decoder`, of a shard: `config` is the shard's, `cache` holds its heads. Make it with `parallel_decoder`."""

    across_ranks = True

    def __init__(
        self, config: ModelConfig, weights: Weights, attention: Any, cache: list[torch.Tensor], shard: Shard
    ) -> None:
        super().__init__(config, weights, attention, cache)
        self._shard = shard
        self._ids = shard.vocabulary(config.vocab_size)

    def carry(self, carried: Carried) -> torch.Tensor:
        ids = super().carry(carried)  # what other ranks have there are no ids: rank 0 alone samples
        dist.broadcast(ids, 0)
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        there = (ids >= self._ids.start) & (ids < self._ids.stop)
        local = (ids - self._ids.start).clamp(0, len(self._ids) - 1)
        rows = self.weights.embedding[local].to(self.weights.norm.dtype)
        return self.total(rows.masked_fill_(~there[:, None], 0.0))

    def total(self, part: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(part)
        return part

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        part = super().logits(hidden)  # [rows, ids of this rank]
        first = Shard(0, self._shard.size).vocabulary(self.config.vocab_size)
        part = pad(part, (0, len(first) - part.shape[1]))
        if self._shard.rank:
            dist.gather(part, dst=0)
            return part
        parts = [torch.empty_like(part) for _ in range(self._shard.size)]
        dist.gather(part, parts, dst=0)
        return torch.cat(parts, 1)[:, : self.config.vocab_size]


def parallel_decoder(kernels: str, opened: Opened, weights: Weights, pool: KVPool, shard: Shard) -> ParallelDecoder:
    """Of this rank, with the kernels that were asked for; `auto` are torch operations."""
    config = shard.config(opened.config)
    if kernels == "triton":
        from lanewise.engine.parallel_triton import ParallelTritonDecoder

        attention = triton_attention(config, pool.page_tokens, opened.dtype, opened.device)
        return ParallelTritonDecoder(config, weights, attention, pool.layers, shard)
    plain = select_attention(config.head_dim, config.num_kv_heads, pool.page_tokens, opened.dtype, opened.device)
    return ParallelDecoder(config, weights, plain, pool.layers, shard)
