"""Checkpoints with random weights in the shapes that the GPU table is about.

Owns: the shapes, their file on disk. Must not: measure.

In the file all layers are the same bytes: a 32B model is then 4 GiB on disk instead of 61. A GPU gets a copy for each
layer as from any checkpoint, so that what is read and computed is the same; on a CPU, which maps the file, layers would
share their caches. Readers other than ours may refuse such a file.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.peers import write_tokenizer
from lanewise.engine.model_config import ModelConfig, read_model_config
from lanewise.engine.weights import expected_shapes

TOKEN_IDS = (300, 31_000)
ALIGNMENT = 64


@dataclass(frozen=True)
class Wanted:
    """What the table asks for; None: a figure without a limit."""

    cold_ttft_ms: float | None = None  # at concurrency 1, mean, at the server
    crowd_ttft_ms: float | None = None  # at the highest concurrency, median
    decode_step_ms: float | None = None
    prefill_share: float | None = None  # of the rate of a plain product


@dataclass(frozen=True)
class Shape:
    """A Qwen2, and how much of everything is asked of it."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    wanted: Wanted
    context_tokens: int = 8192 + 512
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    least_requests: int = 300  # of one measurement; eight for each client of a large crowd
    decode: tuple[int, int] = (32, 2048)  # sequences, tokens of each
    prefill_tokens: int = 8192
    product: int = 8192  # the side of the plain product
    split_prompt_tokens: int = 1024
    split_kv_bytes: int = 4 << 30  # of each of two processes on one GPU
    repeats: int = 20

    @property
    def token_bytes(self) -> int:
        """KV of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


SHAPES = {
    "32b": Shape(5120, 27_648, 64, 40, 8, 128, 152_064, Wanted(22.0, 259.0, 25.0, 0.55)),
    "7b": Shape(3584, 18_944, 28, 28, 4, 128, 152_064, Wanted(prefill_share=0.55)),
    "tiny": Shape(
        64, 96, 2, 4, 2, 16, 32_000, Wanted(), context_tokens=512, concurrencies=(1, 4), least_requests=8,
        decode=(4, 64), prefill_tokens=256, product=256, split_prompt_tokens=64, split_kv_bytes=4 << 20, repeats=3,
    ),
}  # fmt: skip


def make_model(directory: Path, shape: Shape) -> None:
    """Writes config, tokenizer and weights in bf16; nothing where they are there already."""
    if (directory / "model.safetensors").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, shape.vocab)
    part = directory / "model.safetensors.part"
    _write_weights(part, read_model_config(directory))
    part.rename(directory / "model.safetensors")


def _write_weights(path: Path, config: ModelConfig) -> None:
    header, regions, size = {}, {}, 0
    for name, shape in expected_shapes(config):
        region = re.sub(r"layers\.\d+", "layers", name)
        if region not in regions:
            regions[region] = (size, shape)
            size += -(-2 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
        start = regions[region][0]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, start + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    torch.manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for region, (start, shape) in regions.items():
            values = torch.empty(shape, dtype=torch.bfloat16)
            if "norm" in region:
                values.fill_(1.0)
            elif region.endswith("bias"):
                values.zero_()
            else:
                values.normal_(std=0.02)
            file.seek(8 + len(text) + start)
            file.write(values.view(torch.int16).numpy().data)
        file.truncate(8 + len(text) + size)
