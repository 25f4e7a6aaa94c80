"""Small random models of every family, what `transformers` says with them, and a minimal loop to drive the engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lanewise.config import WorkerConfig
from lanewise.engine.runner import Engine, Work
from lanewise.engine.sequence import Sequence
from lanewise.kernels.native import CannotBuild, available
from lanewise.request import Sampling

NUM_PROMPTS = 20
NUM_TOKENS = 64
VOCAB = 512
KEY = b"k" * 32
MIN_MARGIN = 1e-3
"""Logit distance of the best two entries below which rounding may decide; the oracle's prompts keep clear of it."""

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 75, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 100, "num_key_value_heads": 1}),
}


@dataclass(frozen=True)
class Oracle:
    """What transformers generates greedily, one prompt after the other in fp32."""

    directory: Path
    prompts: list[list[int]]
    outputs: list[list[int]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Makes a random model of a family and saves it; returns directory and transformers model."""

    def build(family: str, dtype: str = "float32", shards: str | None = None, **changes: Any) -> tuple[Path, Any]:
        name, fields = FAMILIES[family]
        with quiet():
            import transformers

            transformers.utils.logging.disable_progress_bar()
            config = getattr(transformers, name)(**{**COMMON, **fields, **changes})
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if parameter.dim() == 1:  # biases and norms are made neutral, which would hide mistakes
                        parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
            directory = tmp_path_factory.mktemp(family)
            model = model.to(getattr(torch, dtype))
            model.save_pretrained(directory, **({"max_shard_size": shards} if shards else {}))
            (directory / "tokenizer.json").write_text("{}")
        return directory, model

    return build


@pytest.fixture(scope="session", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, build_model: Callable[..., tuple[Path, Any]]) -> Oracle:
    directory, model = build_model(request.param)
    generator = torch.Generator().manual_seed(len(request.param))
    lengths = [1, 2, 3, 63, 64, 65, 128, 129, 900, *torch.randint(4, 900, (23,), generator=generator).tolist()]
    prompts = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    outputs, margins = oracle_generate(model, prompts)
    kept = [index for index, margin in enumerate(margins) if margin > MIN_MARGIN][:NUM_PROMPTS]
    assert len(kept) == NUM_PROMPTS
    return Oracle(directory, [prompts[index] for index in kept], [outputs[index] for index in kept])


def oracle_generate(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """Greedy outputs, and each prompt's smallest distance between the best two logits."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with quiet(), torch.no_grad():
        result = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(result.logits, 1).topk(2).values  # [prompts, tokens, 2]
    return result.sequences[:, width:].tolist(), (best[..., 0] - best[..., 1]).amin(1).tolist()


class quiet(warnings.catch_warnings):
    """Third-party warnings are not ours to fix."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.simplefilter("ignore")


@pytest.fixture(scope="session")
def load() -> Callable[..., Engine]:
    """An engine with a small pool."""

    def load_engine(directory: Path | str, **changes: Any) -> Engine:
        settings = {"threads": 1, "kv_cache_bytes": 24 << 20, "device": "cpu", **changes}
        return Engine.load(WorkerConfig(model=str(directory), **settings))

    return load_engine


@pytest.fixture(scope="session")
def small_engine(build_model: Callable[..., tuple[Path, Any]], load: Callable[..., Engine]) -> Engine:
    """One engine for tests to which the family does not matter."""
    return load(build_model("qwen3")[0])


@pytest.fixture(scope="session", params=["native", "torch"])
def engine(request: pytest.FixtureRequest, oracle: Oracle, load: Callable[..., Engine]) -> Engine:
    """The oracle's model with each set of CPU kernels: both must answer the same."""
    if request.param == "native" and not native_kernels():
        pytest.skip("no native kernels on this machine: the torch kernels are tested alone")
    return load(oracle.directory, kernels=request.param)


def native_kernels() -> bool:
    try:
        available()
    except CannotBuild:
        return False
    return True


class Driver:
    """The least a worker loop does: attach, ensure, step, append, finish, seal, release."""

    def __init__(self, chunk_tokens: int = 512, concurrency: int = 16, key: bytes = KEY) -> None:
        self.chunk_tokens = chunk_tokens
        self.concurrency = concurrency
        self.key = key

    def open(self, prompts: Iterable[list[int]], sampling: Sampling | list[Sampling]) -> list[Sequence]:
        prompts = list(prompts)
        samplings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        return [
            Sequence((f"r{index}", 1), list(prompt), len(prompt), each)
            for index, (prompt, each) in enumerate(zip(prompts, samplings, strict=True))
        ]

    def run(self, engine: Engine, seqs: list[Sequence]) -> list[list[int]]:
        """Outputs of all, `concurrency` at a time; prefill chunks and decode steps share batches."""
        waiting, running = list(seqs), []
        while waiting or running:
            while waiting and len(running) < self.concurrency:
                seq = waiting.pop(0)
                if not seq.pages:
                    engine.pool.attach(seq, self.key)
                running.append(seq)
            self.step(engine, running)
            for seq in [seq for seq in running if seq.num_output and seq.finish(seq.ids[-1])]:
                engine.pool.seal(seq, self.key)
                engine.pool.release(seq)
                running.remove(seq)
            assert engine.pool.audit(seqs) == []
        return [seq.ids[seq.num_prompt :] for seq in seqs]

    def step(self, engine: Engine, running: list[Sequence]) -> None:
        work = []
        for seq in running:
            num_new = min(seq.num_uncomputed, self.chunk_tokens)
            assert engine.pool.ensure(seq, seq.num_computed + num_new)
            work.append(Work(seq, num_new))
        for seq, sampled in zip(running, engine.step(work), strict=True):
            if sampled is not None:
                seq.ids.append(sampled.token_id)


@pytest.fixture(scope="session")
def driver() -> type[Driver]:
    return Driver
