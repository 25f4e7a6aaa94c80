"""The decoder on a CPU through the native kernels: weights packed once, the whole forward pass in C++.

Owns: which models the native kernels take, and the records they read. Must not: compute, or know sequences.
The weights themselves are not needed afterwards, except the embedding: it stays a view of the mapped file.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch.nn.functional import pad

from lanewise.engine.carried import Carried
from lanewise.engine.model import OnLayers
from lanewise.engine.model_config import ModelConfig
from lanewise.engine.quantise import Linear, as_bytes
from lanewise.engine.rope import RotaryEmbedding
from lanewise.engine.sources import Progress
from lanewise.engine.weights import LayerWeights, Weights
from lanewise.kernels.cpu_build import Variant
from lanewise.kernels.native import (
    LANES,
    PANEL,
    CannotBuild,
    Layer,
    Model,
    NativeDecoder,
    Packed,
    PackedWeight,
    Packer,
    available,
)
from lanewise.kernels.plan import Span

EMBEDDING_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_HEAD_DIM = 256
MAX_GROUP = 96


def native_variant(config: ModelConfig, dtype: torch.dtype) -> Variant:
    """The native kernels that will serve this model; CannotBuild says why there are none."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise CannotBuild(f"the native kernels compute in float32 or bfloat16, not {dtype}")
    if config.hidden_size % LANES or config.head_dim % LANES or config.head_dim > MAX_HEAD_DIM:
        raise CannotBuild(
            f"hidden size {config.hidden_size} and head size {config.head_dim} must be multiples of {LANES}, and heads "
            f"no wider than {MAX_HEAD_DIM}"
        )
    if config.num_heads // config.num_kv_heads > MAX_GROUP:
        raise CannotBuild(f"more than {MAX_GROUP} query heads share a key-value head")
    return available()


class NativeModel:
    """Makes packed weights and records of `weights`, and runs them on the KV in `cache`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        cache: list[torch.Tensor],
        variant: Variant,
        threads: int,
        on_progress: Progress | None = None,
    ) -> None:
        self.kernels = f"native {variant.name}"
        self.num_layers = config.num_layers
        self._packer = Packer(variant, threads)
        self._dtype = weights.norm.dtype
        self._memory: list[torch.Tensor] = []  # what the records point to
        self._packed: list[PackedWeight] = []
        page_tokens = cache[0].shape[2]
        layers = (Layer * config.num_layers)()
        for index, layer in enumerate(weights.layers):
            self._fill(layers[index], layer, cache[index], config.windows[index])
            if on_progress is not None:
                on_progress("pack", index + 1, config.num_layers)
        rope = RotaryEmbedding(config.rope, config.head_dim, torch.device("cpu"))
        record = Model(
            hidden=config.hidden_size,
            inner=_up(config.intermediate_size, LANES),
            vocab=config.vocab_size,
            page_tokens=page_tokens,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_layers=config.num_layers,
            norm_eps=config.rms_norm_eps,
            rope_scale=rope.scale,
            frequencies=self._keep(rope.frequencies),
            embedding=self._keep(weights.embedding),
            embedding_kind=EMBEDDING_KINDS[weights.embedding.dtype],
            head=self._pack(weights.head),
            norm=self._keep(weights.norm.float()),
            layers=layers,
        )
        self._decoder = NativeDecoder(variant, record, self._dtype == torch.bfloat16, threads)
        self._records = (record, layers)

    def run(
        self,
        spans: Seq[Span],
        ids: Seq[Seq[int]],
        sampled: Seq[bool],
        on_layers: OnLayers | None = None,
        carried: Carried | None = None,
    ) -> torch.Tensor | None:
        """As `model.Decoder.run`."""
        if carried is not None:
            ids = carried.known(ids)
        self._decoder.begin([token for part in ids for token in part], spans, sampled)
        if on_layers is None:
            self._decoder.layers(0, self.num_layers)
        else:
            for index in range(self.num_layers):
                self._decoder.layers(index, index + 1)
                on_layers(index, index + 1)
        return self._decoder.logits(sum(sampled)) if any(sampled) else None

    def _fill(self, record: Layer, layer: LayerWeights, cache: torch.Tensor, window: int | None) -> None:
        record.keys, record.values = cache[0].data_ptr(), cache[1].data_ptr()
        record.window = window or 0
        record.attention_norm = self._keep(layer.attention_norm.float())
        record.mlp_norm = self._keep(layer.mlp_norm.float())
        if layer.query_norm is not None and layer.key_norm is not None:
            record.query_norm = self._keep(layer.query_norm.float())
            record.key_norm = self._keep(layer.key_norm.float())
        inputs = [layer.query, layer.key, layer.value]
        record.qkv = self._pack(_joined(inputs, torch.cat))
        record.qkv_bias = self._bias([part.bias for part in inputs])
        record.output, record.output_bias = self._pack(layer.output), self._bias([layer.output.bias])
        gate, up = (_padded(part) for part in (layer.gate, layer.up))
        record.gate_up = self._pack(_joined([gate, up], _interleave))
        if gate.bias is not None and up.bias is not None:
            record.gate_up_bias = self._keep(_interleave([gate.bias, up.bias]).float())
        down = as_bytes(layer.down.weight)
        down = pad(down, (0, _up(down.shape[1], LANES) - down.shape[1])).view(layer.down.weight.dtype)
        record.down = self._pack(replace(layer.down, weight=down))
        record.down_bias = self._bias([layer.down.bias])

    def _pack(self, layer: Linear) -> Packed:
        if layer.scales is None:
            packed = self._packer.pack(layer.weight.to(self._dtype))
        else:
            packed = self._packer.pack_bytes(layer.weight, layer.scales, self._dtype, rounded_rows=layer.rounded_rows)
        self._packed.append(packed)
        return packed.record

    def _bias(self, parts: list[torch.Tensor | None]) -> int | None:
        """The biases one after the other, in fp32, filled up to whole panels."""
        there = [part.float() for part in parts if part is not None]
        if not there:
            return None
        whole = torch.cat(there)
        return self._keep(pad(whole, (0, _up(len(whole), PANEL) - len(whole))))

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._memory.append(tensor)
        return tensor.data_ptr()


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded(layer: Linear) -> Linear:
    """With zero outputs up to whole vectors: silu(0) * 0 adds nothing."""
    missing = _up(len(layer.weight), LANES) - len(layer.weight)
    weight = pad(as_bytes(layer.weight), (0, 0, 0, missing)).view(layer.weight.dtype)
    bias, scales = (None if part is None else pad(part, (0, missing)) for part in (layer.bias, layer.scales))
    return replace(layer, weight=weight, bias=bias, scales=scales)


def _joined(parts: list[Linear], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Linear:
    """Several products of the same rows as one, without biases."""
    weight = join([as_bytes(part.weight) for part in parts]).view(parts[0].weight.dtype)
    scales = [part.scales for part in parts if part.scales is not None]
    return Linear(weight, None, join(scales) if scales else None, parts[0].rounded_rows)


def _interleave(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sixteen outputs of gate, sixteen of up, and so on, so that both halves of a product meet in one panel."""
    stacked = torch.stack([part.view(-1, LANES, *part.shape[1:]) for part in parts], 1)
    return stacked.flatten(0, 2)
