"""The engine of a worker: a loaded model, its KV pool, and one forward pass at a time.

Owns: loading in order (device, cores, weights, pool) and `step`. Must not: decide what to compute (the loops and
policies do), end or preempt sequences, or be used from two threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lanewise.config import WorkerConfig
from lanewise.engine import machine, power, sources, weights
from lanewise.engine.assemble import Opened, count_pages, make_decoder, open_model
from lanewise.engine.kv_pool import KVPool, layout_of
from lanewise.engine.model import Decoder, OnLayers
from lanewise.engine.native_model import NativeModel
from lanewise.engine.phases import Phases
from lanewise.engine.ranks import Ranks, share
from lanewise.engine.sampler import Sampled, sample
from lanewise.engine.sequence import Sequence
from lanewise.engine.shard import Shard
from lanewise.kernels.plan import Span
from lanewise.request import Sampling

__all__ = ["Engine", "Sampled", "Work"]


@dataclass(slots=True)
class Work:
    """Compute ids[num_computed : num_computed + num_new] of `seq`, whose pages the pool has ensured."""

    seq: Sequence
    num_new: int


class Engine:
    """Make it with `load`."""

    def __init__(
        self,
        opened: Opened,
        decoder: Decoder | NativeModel,
        pool: KVPool,
        fields: dict[str, str],
        phases: Phases,
    ) -> None:
        self._phases = phases
        self._ranks: Ranks | None = None
        self.startup_s = phases.seconds
        self.model_dir = opened.directory
        self.model_config = model_config = opened.config
        self.pool = pool
        self.fingerprint_fields = fields
        self.fingerprint = weights.fingerprint(fields)
        self.eos_ids = model_config.eos_ids
        self.vocab_size = model_config.vocab_size
        self.max_context_tokens = opened.max_context_tokens
        self.device = str(pool.device)
        self.memory_bytes = machine.memory_bytes(pool.device)
        self.power_watts = power.limit_watts(pool.device)
        self.kernels = decoder.kernels
        self._decoder = decoder

    @classmethod
    def load(cls, config: WorkerConfig, on_progress: sources.Progress | None = None) -> Engine:
        """A ready engine, or ConfigError. Binds the calling thread to the worker's cores if it has its own."""
        phases = Phases()
        opened = open_model(share(config, 0), on_progress)
        ranks = Ranks(config, opened) if config.tensor_parallel > 1 else None
        dtype = str(opened.dtype).removeprefix("torch.")
        fields = weights.fingerprint_fields(opened.checkpoint, opened.config, dtype, config.weights)
        if config.kv_encoding != "Native":
            fields["kv_encoding"] = config.kv_encoding  # so that what came by it has cache keys of its own
        phases.end("open")
        try:
            with torch.inference_mode():
                shard = Shard(0, config.tensor_parallel)
                loaded = weights.load_weights(
                    opened.checkpoint, opened.config, opened.dtype, opened.device, on_progress, config.weights, shard
                )
                phases.end("load")
                num_pages = count_pages(config, opened, loaded)
                decoder: Decoder | NativeModel
                if ranks is None:
                    pool = KVPool(layout_of(opened.config, opened.dtype), num_pages, config.page_tokens, opened.device)
                    decoder = make_decoder(config, opened.config, loaded, pool, on_progress)
                else:
                    pool, decoder = ranks.lead(opened, loaded, num_pages, config.page_tokens)
        except BaseException:
            if ranks is not None:
                ranks.close()
            raise
        phases.end("pack")
        engine = cls(opened, decoder, pool, fields, phases)
        engine._ranks = ranks
        return engine

    def close(self) -> None:
        """Ends the other ranks, where there are some. A worker process need not: they end with it."""
        if self._ranks is not None:
            self._ranks.close()

    @torch.inference_mode()
    def step(self, work: list[Work], on_layers: OnLayers | None = None) -> list[Sampled | None]:
        """One forward pass over all work. Where all ids of a sequence are then computed, its next token is sampled and
        returned (not appended), else None. `on_layers(lo, hi)` is called when the KV of these layers is in the pool."""
        for item in work:
            if not 0 < item.num_new <= item.seq.num_uncomputed:
                raise ValueError(f"{item.seq.key}: cannot compute {item.num_new} of {item.seq.num_uncomputed} ids")
            if item.seq.num_computed + item.num_new > len(item.seq.pages) * self.pool.page_tokens:
                raise ValueError(f"{item.seq.key}: pages have not been ensured")
        if not work:
            return []
        spans = [Span(item.seq.pages, item.seq.num_computed, item.num_new) for item in work]
        ids = [item.seq.ids[item.seq.num_computed : item.seq.num_computed + item.num_new] for item in work]
        complete = [item.num_new == item.seq.num_uncomputed for item in work]
        logits = self._decoder.run(spans, ids, complete, self._synchronised(on_layers))
        for item in work:
            item.seq.num_computed += item.num_new
        results: list[Sampled | None] = [None] * len(work)
        if logits is not None:
            wanted = [index for index, flag in enumerate(complete) if flag]
            for index, token in zip(wanted, sample(logits, [work[index].seq for index in wanted]), strict=True):
                results[index] = token
        return results

    def warm_up(self) -> None:
        """One short prefill and one decode step, so that the first request meets loaded pages and chosen kernels; then
        memory of the pool is populated in the background."""
        ids = [index % self.vocab_size for index in range(min(32, self.max_context_tokens - 2))]
        seq = Sequence(("warm-up", 0), ids, len(ids), Sampling(max_tokens=2, temperature=0.0))
        try:
            for _ in range(2):
                if not self.pool.ensure(seq, len(seq.ids)):
                    return
                sampled = self.step([Work(seq, seq.num_uncomputed)])[0]
                assert sampled is not None
                seq.ids.append(sampled.token_id)
        finally:
            self.pool.release(seq)
            self.pool.populate()
            self._phases.end("warm")

    def _synchronised(self, on_layers: OnLayers | None) -> OnLayers | None:
        """On a GPU the host runs ahead: wait until the KV is really there before saying so."""
        if on_layers is None or self.pool.device.type == "cpu":
            return on_layers
        said: Callable[[int, int], None] = on_layers

        def after(low: int, high: int) -> None:
            torch.cuda.current_stream(self.pool.device).synchronize()
            said(low, high)

        return after
