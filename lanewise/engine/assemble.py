"""The parts of an engine, made from a configuration: the opened model, its pool, its decoder.

Owns: which kernels serve, the size of the pool, what each rank of a worker takes of the machine.
Must not: run steps (runner.py does).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch

from lanewise.config import WorkerConfig
from lanewise.engine import machine, sources, weights
from lanewise.engine.checkpoint import Checkpoint
from lanewise.engine.kv_pool import KVPool, layout_of, pool_pages
from lanewise.engine.model import Decoder
from lanewise.engine.model_config import ModelConfig, read_model_config
from lanewise.engine.native_model import NativeModel, native_variant
from lanewise.engine.shard import Shard
from lanewise.errors import ConfigError
from lanewise.kernels.native import CannotBuild
from lanewise.kernels.select import select_attention

if TYPE_CHECKING:
    from lanewise.kernels.triton_attention import TritonAttention

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """A model whose files are there and make sense, before its weights are read."""

    directory: Path
    checkpoint: Checkpoint
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    max_context_tokens: int


def open_model(config: WorkerConfig, on_progress: sources.Progress | None = None) -> Opened:
    """ConfigError where the model or the configuration cannot be served. Binds the calling thread to its cores."""
    device = machine.choose_device(config.device)
    if device.type == "cpu":
        machine.bind_cores(config.cores, config.threads)
    directory = sources.resolve(config.model, config.revision, on_progress)
    model_config = read_model_config(directory)
    checkpoint = Checkpoint(directory)
    dtype = weights.compute_dtype(config.dtype, checkpoint, device, config.model.startswith(sources.BUILTIN))
    return Opened(directory, checkpoint, model_config, dtype, device, context_limit(config, model_config))


def context_limit(config: WorkerConfig, model_config: ModelConfig) -> int:
    asked = config.max_context_tokens
    if asked > model_config.max_context_tokens:
        raise ConfigError(f"max_context_tokens {asked} exceeds the model's own {model_config.max_context_tokens}")
    return asked or model_config.max_context_tokens


def make_decoder(
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
    attention = triton_attention(model_config, config.page_tokens, loaded.norm.dtype, pool.device)
    from lanewise.engine.capturing import Budget
    from lanewise.engine.graphs import GraphedDecoder
    from lanewise.engine.triton_model import TritonDecoder

    if pool.device.type == "cpu" or not config.graph_capture_s:
        return TritonDecoder(model_config, loaded, attention, pool.layers)
    decoder = GraphedDecoder(model_config, loaded, attention, pool.layers)
    context = config.max_context_tokens or model_config.max_context_tokens
    budget = Budget(config.graph_capture_s, config.graph_memory_bytes)
    decoder.prepare(context, config.max_running, config.max_batch_tokens, budget)
    return decoder


def triton_attention(
    model_config: ModelConfig, page_tokens: int, dtype: torch.dtype, device: torch.device
) -> TritonAttention:
    """ConfigError where the Triton kernels cannot serve. Triton is imported here and nowhere before."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("kernels: triton needs a GPU; this worker's device is cpu")
    from lanewise.kernels.triton_attention import TritonAttention

    try:
        return TritonAttention(model_config.head_dim, model_config.num_kv_heads, page_tokens, dtype, device)
    except ValueError as error:
        raise ConfigError(f"kernels: triton: {error}") from error


def count_pages(config: WorkerConfig, opened: Opened, loaded: weights.Weights) -> int:
    """Pages of the pool: the same number on each rank, with a share of the heads."""
    size = config.tensor_parallel
    model_config = Shard(0, size).config(opened.config)
    layout = layout_of(model_config, opened.dtype)
    rows = config.max_batch_tokens + config.max_running
    activations = rows * (6 * model_config.hidden_size + 3 * model_config.intermediate_size)
    scores = config.max_batch_tokens * opened.max_context_tokens + 4 * config.max_running * model_config.vocab_size
    together = size if opened.device.type == "cpu" else 1  # ranks on the same memory
    return pool_pages(
        layout,
        config.page_tokens,
        asked_bytes=config.kv_cache_bytes // size,
        memory_bytes=machine.memory_bytes(opened.device),
        weight_bytes=loaded.num_bytes() * together,
        workspace_bytes=4 * (activations + scores),
        sharing=config.sharing * together,
        useful_tokens=config.max_running * opened.max_context_tokens,
    )
