"""Small random models of every family, and what `transformers` answers with the same weights.

Owns: the model directories of the end-to-end tests and the oracle. The oracle is another implementation on purpose.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

FABLE = Path(__file__).parents[2] / "lanewise" / "models" / "fable"
VOCAB = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,  # wide enough that the best two logits differ by far more than rounding
    "bos_token_id": None,
    "eos_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "llama": (
        "Llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 128, "head_dim": 16}),
}


def make_model(family: str, directory: Path, seed: int = 0) -> Path:
    """A model directory with random weights and a byte-level tokenizer."""
    import torch
    import transformers

    name, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms are constant otherwise, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def prompts(vocab: int, count: int = 20, longest: int = 900, seed: int = 1) -> list[list[int]]:
    """Random ids; lengths spread from 1 to `longest`, with page and unit borders among them."""
    dice = random.Random(seed)
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 256, 300, 448, 512, 513, 640, 777, longest][:count]
    return [[dice.randrange(1, vocab) for _ in range(length)] for length in lengths]


def oracle(directory: Path, batch: Sequence[Sequence[int]], tokens: int = 64) -> list[list[int]]:
    """Greedy continuation by transformers in fp32, end-of-text ignored."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.set_num_threads(1)  # the services under test need the cores; two pools on two cores crawl
    model.eval()
    # Renamed in transformers 5.24, which warns of the old name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    out = []
    with torch.inference_mode():
        for prompt in batch:
            ids = torch.tensor([list(prompt)])
            cache, result = None, []
            for _ in range(tokens):
                step = model(input_ids=ids, use_cache=True, **{name: cache})
                cache = getattr(step, name)
                token = int(step.logits[0, -1].argmax())
                result.append(token)
                ids = torch.tensor([[token]])
            out.append(result)
    return out
