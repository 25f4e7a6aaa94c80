"""Train the model behind builtin://fable and write it as an ordinary Hugging Face folder.

Owns the model's shape, its training and its measurement; the text is fable_corpus's, the tokens fable_tokenizer's.
It only writes into --out. The same --seed and --steps on the same kind of processor give the same weights.

    python tools/train_fable.py --minutes 35
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fable_corpus
import fable_tokenizer
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

MAX_POSITIONS = 2048
EVAL_WINDOW = 1024  # tokens of context at most when measuring bits per byte
BATCH_TOKENS = 4096
LENGTHS = (256, 512, 1024, 2048)
LENGTH_SHARES = (0.6, 0.25, 0.09, 0.06)  # of the steps
CHAT_SHARE = 0.12  # of the steps
SAMPLE_BOOKS = ("eliot", "andersen", "persuasion", "woolf")
SAMPLE_CHARS_PER_BOOK = 11_000

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": MAX_POSITIONS,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": fable_tokenizer.VOCAB_SIZE,
}
GENERATION_CONFIG = {"eos_token_id": [2, 0], "pad_token_id": 0}


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn."""

    num_steps: int
    peak_lr: float
    weight_decay: float = 0.1
    warmup_share: float = 0.03
    final_lr_share: float = 0.02

    def lr(self, step: int) -> float:
        """Linear warmup, then linear down to a small share of the peak."""
        warmup = max(1, int(self.num_steps * self.warmup_share))
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        return self.peak_lr * max(self.final_lr_share, 1 - progress)


class Batches:
    """Endless batches [rows, length + 1]: shuffled documents packed end to end, and now and then chat frames."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, seed: int) -> None:
        self._rng = random.Random(seed)
        self._texts = texts
        self._tokenizer = tokenizer
        self._documents = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        self._stream = self._read()
        self.num_tokens = sum(map(len, self._documents))

    def next(self, length: int | None = None) -> torch.Tensor:
        """The next batch of about BATCH_TOKENS tokens, of a random length unless told."""
        length = length or self._rng.choices(LENGTHS, LENGTH_SHARES)[0]
        source = self._chat if self._rng.random() < CHAT_SHARE else self._prose
        return torch.tensor([source(length + 1) for _ in range(BATCH_TOKENS // length)])

    def _prose(self, size: int) -> list[int]:
        return [next(self._stream) for _ in range(size)]

    def _read(self) -> Iterator[int]:
        while True:
            for document in self._rng.sample(self._documents, len(self._documents)):
                yield 0  # <|endoftext|>
                yield from document

    def _chat(self, size: int) -> list[int]:
        row: list[int] = []
        while len(row) < size:
            # By length, so that a paragraph of a long chapter is as likely as one of a short tale.
            text = self._rng.choices(self._texts, self._weights())[0]
            row += self._tokenizer.encode(fable_tokenizer.chat_frame(text, self._rng)).ids
        return row[:size]

    def _weights(self) -> list[int]:
        return [len(document) for document in self._documents]


def build_model(seed: int) -> Qwen2ForCausalLM:
    """A fresh model in fp32."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**{**CONFIG, "torch_dtype": "float32"}))


def loss_on(model: Qwen2ForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats; matrix products in bf16, loss in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def optimizers_for(model: Qwen2ForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW without decay for embeddings, norms and biases.

    With so few steps Muon is worth a lot: 100 steps of it beat 190 of AdamW by 0.25 bits per byte.
    """
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    return [
        # match_rms_adamw: the same learning rate suits both.
        torch.optim.Muon(inside, plan.peak_lr, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, plan.peak_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(model: Qwen2ForCausalLM, batches: Batches, plan: Plan) -> None:
    """Run the plan, printing progress."""
    optimizers = optimizers_for(model, plan)
    model.train()
    started = time.monotonic()
    recent: list[float] = []
    for step in range(plan.num_steps):
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = plan.lr(step)
        loss = loss_on(model, batches.next())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == plan.num_steps:
            elapsed_s = time.monotonic() - started
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{plan.num_steps} loss {mean:.3f} nats/token {elapsed_s:.0f} s", flush=True)
            recent.clear()


def steps_in(minutes: float, model: Qwen2ForCausalLM, batches: Batches) -> int:
    """How many steps fit, from the speed of a few forward and backward passes (which change nothing)."""
    mean_length = 512
    loss_on(model, batches.next(mean_length)).backward()
    started = time.monotonic()
    for _ in range(3):
        loss_on(model, batches.next(mean_length)).backward()
    step_s = (time.monotonic() - started) / 3 * 1.1  # the optimizers' share
    model.zero_grad()
    return max(20, int(minutes * 60 / step_s))


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> float:
    """Bits the model needs per UTF-8 byte of `text`, in windows of EVAL_WINDOW tokens that share no context."""
    ids = tokenizer.encode(text).ids
    nats = 0.0
    for start in range(0, len(ids), EVAL_WINDOW - 1):
        window = torch.tensor([[0, *ids[start : start + EVAL_WINDOW - 1]]])  # <|endoftext|> first
        logits = model(input_ids=window).logits.float()
        nats += cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode("utf-8"))


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, weights (bf16) and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    # The head is the embedding table (tied), stored once.
    weights = {k: v.detach().to(torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fable_tokenizer.save_tokenizer(tokenizer, folder, MAX_POSITIONS)


def report(folder: Path, corpus: fable_corpus.Corpus, sample: str) -> None:
    """Measure what was stored, as others will load it: fp32, from the files."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total_bits, total_bytes = 0.0, 0
    for book, documents in corpus.heldout.items():
        text = "\n\n".join(documents)
        size = len(text.encode("utf-8"))
        bits = bits_per_byte(model, tokenizer, text)
        total_bits, total_bytes = total_bits + bits * size, total_bytes + size
        print(f"held out {book}: {bits:.3f} bits/byte on {size} bytes")
    print(f"held out, all: {total_bits / total_bytes:.3f} bits/byte on {total_bytes} bytes")
    print(f"held-out sample: {bits_per_byte(model, tokenizer, sample):.3f} bits/byte on {len(sample.encode())} bytes")


def parse_args() -> argparse.Namespace:
    repo = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="Train builtin://fable.")
    parser.add_argument("--minutes", type=float, default=35.0, help="training time; sets --steps from a speed test")
    parser.add_argument("--steps", type=int, help="number of steps; repeats a run exactly")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--corpus", type=Path, default=repo / "build/fable_corpus", help="where the packages are kept")
    parser.add_argument("--out", type=Path, default=repo / "lanewise/models/fable")
    parser.add_argument("--sample", type=Path, help="also write the held-out sample of the tests here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    fable_corpus.fetch(args.corpus)
    corpus = fable_corpus.load(args.corpus)
    sample = fable_corpus.heldout_sample(corpus, SAMPLE_BOOKS, SAMPLE_CHARS_PER_BOOK)
    if args.sample:
        args.sample.write_text(sample, encoding="utf-8")
    tokenizer = fable_tokenizer.train_tokenizer(corpus.train)
    model = build_model(args.seed)
    num_steps = args.steps or steps_in(args.minutes, model, Batches(corpus.train[:50], tokenizer, args.seed))
    batches = Batches(corpus.train, tokenizer, args.seed)
    num_bytes = sum(len(text.encode("utf-8")) for text in corpus.train)
    print(f"{num_bytes} bytes, {batches.num_tokens} tokens, {num_bytes / batches.num_tokens:.2f} bytes/token")
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters} parameters, {num_steps} steps, seed {args.seed}, {args.threads} thread(s)", flush=True)
    started = time.monotonic()
    train(model, batches, Plan(num_steps, args.lr))
    print(f"trained in {(time.monotonic() - started) / 60:.1f} min")
    save(model, tokenizer, args.out)
    report(args.out, corpus, sample)


if __name__ == "__main__":
    main()
