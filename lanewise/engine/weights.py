"""The tensors a decoder needs, checked, in the compute dtype, on the device; and the fingerprint of it all.

Owns: which tensors a ModelConfig calls for, their shapes, the choice of compute dtype and the conversion.
Must not: read files (checkpoint.py) or compute with the weights (model.py). Nothing is held twice: where dtype and
device match, a weight stays a view of the mapped file; otherwise it is converted alone, before the next is touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from lanewise.engine.checkpoint import Checkpoint
from lanewise.engine.model_config import ModelConfig
from lanewise.engine.quantise import Linear, quantise
from lanewise.engine.shard import Shard
from lanewise.engine.sources import Progress
from lanewise.errors import ConfigError

PROTOCOL = "1"
EMBEDDING = "model.embed_tokens.weight"
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry


@dataclass(slots=True)
class LayerWeights:
    attention_norm: torch.Tensor  # [hidden]
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: torch.Tensor | None  # [head_dim]
    key_norm: torch.Tensor | None  # [head_dim]
    mlp_norm: torch.Tensor  # [hidden]
    gate: Linear
    up: Linear
    down: Linear


@dataclass(slots=True)
class Weights:
    embedding: torch.Tensor  # [vocab, hidden]; on a CPU in the checkpoint's dtype, rows are converted as they are used
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden]
    head: Linear  # [vocab, hidden]; the embedding itself where tied and not converted

    def num_bytes(self) -> int:
        """Of everything that is read in a step."""
        kept = [self.norm, self.head.weight]
        for layer in self.layers:
            parts = (getattr(layer, field.name) for field in dataclasses.fields(layer))
            kept += [part.weight if isinstance(part, Linear) else part for part in parts if part is not None]
        return sum(tensor.nbytes for tensor in kept)


def compute_dtype(asked: str, checkpoint: Checkpoint, device: torch.device, builtin: bool) -> torch.dtype:
    """`auto` keeps the checkpoint's dtype, except that a CPU never computes in fp16 (its GEMM takes minutes there)."""
    if asked == "float16" and device.type == "cpu":
        raise ConfigError("float16 on a CPU is hundreds of times slower than bfloat16; use --dtype bfloat16 or float32")
    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    if builtin and device.type == "cpu":
        return torch.float32
    stored = checkpoint.tensor(EMBEDDING).dtype
    return torch.bfloat16 if stored == torch.float16 and device.type == "cpu" else stored


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Progress | None = None,
    form: str = "full",
    shard: Shard = Shard(),  # noqa: B008  frozen
) -> Weights:
    """The weights of `shard` of the model `config`, those of products in `form` (quantise.FORMS).

    ConfigError names the first tensor that is missing, unknown or of a wrong shape.
    """
    shapes = dict(expected_shapes(config))
    _check(checkpoint, shapes, config)
    head_name = EMBEDDING if config.tied_embeddings else "lm_head.weight"
    done = 0

    def part(name: str) -> torch.Tensor | None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress("load", done, len(shapes))
        held = shard.part(name, checkpoint.tensor(name))
        return None if held is None else _place(held, dtype, device)

    def tensor(name: str) -> torch.Tensor:
        held = part(name)
        assert held is not None
        return held

    def product(name: str) -> Linear:
        bias = part(f"{name}.bias") if f"{name}.bias" in shapes else None
        return quantise(Linear(tensor(f"{name}.weight"), bias), form)

    stored = shard.part(EMBEDDING, checkpoint.tensor(EMBEDDING))
    assert stored is not None
    embedding = stored if device.type == "cpu" else tensor(EMBEDDING)
    layers = [_layer(shapes, tensor, product, f"model.layers.{index}.") for index in range(config.num_layers)]
    norm = tensor("model.norm.weight")
    shared = config.tied_embeddings and device.type != "cpu"
    head = quantise(Linear(embedding if shared else tensor(head_name)), form, rounded_rows=False)
    return Weights(embedding, layers, norm, head)


def _place(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The weight where and as it is computed with; a tensor that fits already stays a view of the file.

    Where a copy for a CPU is made anyway, its longer side is made the contiguous one: a product with one row then reads
    it at 20-30 instead of 9 GB/s.
    """
    if device.type == "cpu" and tensor.dtype != dtype == torch.float32 and tensor.dim() == 2:
        rows, columns = tensor.shape
        if rows > columns:
            return torch.empty((columns, rows), dtype=dtype).t().copy_(tensor)
    return tensor.to(device=device, dtype=dtype)


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of exactly the tensors a model of this configuration uses."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (query, hidden, config.qkv_bias),
        "self_attn.k_proj": (key_value, hidden, config.qkv_bias),
        "self_attn.v_proj": (key_value, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, query, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    yield EMBEDDING, (config.vocab_size, hidden)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, (rows, columns, bias) in linears.items():
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
        if config.qk_norm:
            yield prefix + "self_attn.q_norm.weight", (config.head_dim,)
            yield prefix + "self_attn.k_norm.weight", (config.head_dim,)
    yield "model.norm.weight", (hidden,)
    if not config.tied_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _check(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    for name, shape in shapes.items():
        entry = checkpoint.entries.get(name)
        if entry is None:
            raise ConfigError(f"{checkpoint.directory}: tensor {name} is missing")
        if entry.shape != shape:
            raise ConfigError(
                f"{checkpoint.directory}: tensor {name} has shape {entry.shape}, config.json says {shape}"
            )
    allowed = {"lm_head.weight"} if config.tied_embeddings else set()  # some tied checkpoints store it all the same
    for name in checkpoint.entries:
        if name not in shapes and name not in allowed and not name.endswith(IGNORED_SUFFIXES):
            raise ConfigError(f"{checkpoint.directory}: tensor {name} belongs to no part of a {config.family} model")


def _layer(
    shapes: Collection[str],
    tensor: Callable[[str], torch.Tensor],
    product: Callable[[str], Linear],
    prefix: str,
) -> LayerWeights:
    def norm(name: str) -> torch.Tensor | None:
        return tensor(prefix + name) if prefix + name in shapes else None

    return LayerWeights(
        attention_norm=tensor(prefix + "input_layernorm.weight"),
        query=product(prefix + "self_attn.q_proj"),
        key=product(prefix + "self_attn.k_proj"),
        value=product(prefix + "self_attn.v_proj"),
        output=product(prefix + "self_attn.o_proj"),
        query_norm=norm("self_attn.q_norm.weight"),
        key_norm=norm("self_attn.k_norm.weight"),
        mlp_norm=tensor(prefix + "post_attention_layernorm.weight"),
        gate=product(prefix + "mlp.gate_proj"),
        up=product(prefix + "mlp.up_proj"),
        down=product(prefix + "mlp.down_proj"),
    )


def fingerprint_fields(
    checkpoint: Checkpoint, config: ModelConfig, kv_dtype: str, form: str = "full"
) -> dict[str, str]:
    """What must be equal before the KV of one worker means anything to another, in words a person can compare."""
    tokenizer = checkpoint.directory / "tokenizer.json"
    structure = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("rope", "eos_ids", "max_context_tokens")
    }
    return {
        "protocol": PROTOCOL,
        "weight_digest": checkpoint.digest() + ("" if form == "full" else f" as {form}"),
        "model_config": " ".join(f"{name}={value}" for name, value in structure.items()),
        "rope": " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config.rope).items()),
        "kv_dtype": kv_dtype,
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else "none",
        "adapters": "none",
    }


def fingerprint(fields: dict[str, str]) -> str:
    state = hashlib.sha256()
    for name in sorted(fields):
        state.update(f"{name}={fields[name]}\n".encode())
    return state.hexdigest()
