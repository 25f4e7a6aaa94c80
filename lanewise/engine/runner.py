"""The engine of a worker: a loaded model, its KV pool, and one forward pass at a time.

Owns: loading in order (device, cores, weights, pool) and `step`. Must not: decide what to compute (the loops and
policies do), end or preempt sequences, or be used from two threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from lanewise.config import WorkerConfig
from lanewise.engine import machine, power, sources, weights
from lanewise.engine.checkpoint import Checkpoint
from lanewise.engine.kv_pool import KVPool, layout_of, pool_pages
from lanewise.engine.model import Decoder, OnLayers
from lanewise.engine.model_config import ModelConfig, read_model_config
from lanewise.engine.native_model import NativeModel, native_variant
from lanewise.engine.phases import Phases
from lanewise.engine.sampler import Sampled, sample
from lanewise.engine.sequence import Sequence
from lanewise.errors import ConfigError
from lanewise.kernels.native import CannotBuild
from lanewise.kernels.plan import Span
from lanewise.kernels.select import select_attention
from lanewise.request import Sampling

__all__ = ["Engine", "Sampled", "Work"]

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Work:
    """Compute ids[num_computed : num_computed + num_new] of `seq`, whose pages the pool has ensured."""

    seq: Sequence
    num_new: int


class Engine:
    """Make it with `load`."""

    def __init__(
        self,
        model_dir: Path,
        model_config: ModelConfig,
        decoder: Decoder | NativeModel,
        pool: KVPool,
        fields: dict[str, str],
        phases: Phases,
    ) -> None:
        self._phases = phases
        self.startup_s = phases.seconds
        self.model_dir = model_dir
        self.model_config = model_config
        self.pool = pool
        self.fingerprint_fields = fields
        self.fingerprint = weights.fingerprint(fields)
        self.eos_ids = model_config.eos_ids
        self.vocab_size = model_config.vocab_size
        self.max_context_tokens = model_config.max_context_tokens
        self.device = str(pool.device)
        self.memory_bytes = machine.memory_bytes(pool.device)
        self.power_watts = power.limit_watts(pool.device)
        self.kernels = decoder.kernels
        self._decoder = decoder

    @classmethod
    def load(cls, config: WorkerConfig, on_progress: sources.Progress | None = None) -> Engine:
        """A ready engine, or ConfigError. Binds the calling thread to the worker's cores if it has its own."""
        phases = Phases()
        device = machine.choose_device(config.device)
        if device.type == "cpu":
            machine.bind_cores(config.cores, config.threads)
        directory = sources.resolve(config.model, config.revision, on_progress)
        model_config = read_model_config(directory)
        max_context_tokens = _context_limit(config, model_config)
        checkpoint = Checkpoint(directory)
        builtin = config.model.startswith(sources.BUILTIN)
        dtype = weights.compute_dtype(config.dtype, checkpoint, device, builtin)
        fields = weights.fingerprint_fields(checkpoint, model_config, str(dtype).removeprefix("torch."), config.weights)
        phases.end("open")
        with torch.inference_mode():
            loaded = weights.load_weights(checkpoint, model_config, dtype, device, on_progress, config.weights)
            phases.end("load")
            pool = _make_pool(config, model_config, max_context_tokens, loaded, dtype, device)
            decoder = _make_decoder(config, model_config, loaded, pool, on_progress)
        phases.end("pack")
        engine = cls(directory, model_config, decoder, pool, fields, phases)
        engine.max_context_tokens = max_context_tokens
        return engine

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
        """One short prefill and one decode step, so that the first request meets loaded pages and chosen kernels."""
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


def _context_limit(config: WorkerConfig, model_config: ModelConfig) -> int:
    asked = config.max_context_tokens
    if asked > model_config.max_context_tokens:
        raise ConfigError(f"max_context_tokens {asked} exceeds the model's own {model_config.max_context_tokens}")
    return asked or model_config.max_context_tokens


def _make_decoder(
    config: WorkerConfig,
    model_config: ModelConfig,
    loaded: weights.Weights,
    pool: KVPool,
    on_progress: sources.Progress | None,
) -> Decoder | NativeModel:
    """The native kernels on a CPU where they can be had and are not declined, else torch operations.

    Triton's have to be asked for until they have been run on a GPU.
    """
    dtype = loaded.norm.dtype
    if config.kernels == "triton":
        return _triton_decoder(config, model_config, loaded, pool)
    if config.kernels == "native" and pool.device.type != "cpu":
        raise ConfigError(f"kernels: native runs on a CPU; this worker's device is {pool.device}")
    if pool.device.type == "cpu" and config.kernels != "torch":
        try:
            variant = native_variant(model_config, dtype)
        except CannotBuild as error:
            if config.kernels == "native":
                raise ConfigError(f"kernels: native was asked for: {error}") from error
            log.warning("native_kernels_missing", reason=str(error), instead="torch")
        else:
            native = NativeModel(model_config, loaded, pool.layers, variant, torch.get_num_threads(), on_progress)
            torch.set_num_threads(1)  # what is left to torch is small, and two pools on the same cores crawl
            return native
    attention = select_attention(
        model_config.head_dim, model_config.num_kv_heads, config.page_tokens, dtype, pool.device
    )
    return Decoder(model_config, loaded, attention, pool.layers)


def _triton_decoder(config: WorkerConfig, model_config: ModelConfig, loaded: weights.Weights, pool: KVPool) -> Decoder:
    if pool.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("kernels: triton needs a GPU; this worker's device is cpu")
    from lanewise.engine.triton_model import TritonDecoder
    from lanewise.kernels.triton_attention import TritonAttention

    dim, kv_heads = model_config.head_dim, model_config.num_kv_heads
    try:
        attention = TritonAttention(dim, kv_heads, config.page_tokens, loaded.norm.dtype, pool.device)
    except ValueError as error:
        raise ConfigError(f"kernels: triton: {error}") from error
    return TritonDecoder(model_config, loaded, attention, pool.layers)


def _make_pool(
    config: WorkerConfig,
    model_config: ModelConfig,
    max_context_tokens: int,
    loaded: weights.Weights,
    dtype: torch.dtype,
    device: torch.device,
) -> KVPool:
    layout = layout_of(model_config, dtype)
    rows = config.max_batch_tokens + config.max_running
    activations = rows * (6 * model_config.hidden_size + 3 * model_config.intermediate_size)
    scores = config.max_batch_tokens * max_context_tokens + 4 * config.max_running * model_config.vocab_size
    num_pages = pool_pages(
        layout,
        config.page_tokens,
        asked_bytes=config.kv_cache_bytes,
        memory_bytes=machine.memory_bytes(device),
        weight_bytes=loaded.num_bytes(),
        workspace_bytes=4 * (activations + scores),
        sharing=config.sharing,
        useful_tokens=config.max_running * max_context_tokens,
    )
    return KVPool(layout, num_pages, config.page_tokens, device)
