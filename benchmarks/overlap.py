"""What a transfer costs where it can be seen: the second token, and the throughput of prefill.

    python benchmarks/overlap.py [--shape small wide] [--rounds 3] [--json]

A prefill and a decode worker are two processes with the real loops, one core each, and no router. Three ways take turns
with fresh prompts: `local` (the decode worker prefills), `overlapped` (as served), and `after` (nothing is sent before
the whole prompt is computed). Delay: second token later than with `local`, round by round. Then eight prompts at once,
with transfers and with a sender that sends nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MODES = ("local", "overlapped", "after")


@dataclass(frozen=True)
class Shape:
    what: str
    prompt_tokens: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    dtype: str
    crowd_tokens: int  # of each of eight prompts at once

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * (2 if self.dtype == "bfloat16" else 4)


SHAPES = {
    "small": Shape("118 M, 12 layers, 4 KV heads of 64", 1024, 768, 12, 12, 4, 64, 2688, 32000, "bfloat16", 1024),
    # Little to compute beside its KV, or one core would need a minute for a prompt.
    "wide": Shape("12 layers, 4 KV heads of 256", 4096, 256, 12, 4, 4, 256, 512, 8192, "float32", 2048),
}
CROWD = 8


def make_model(directory: Path, shape: Shape) -> None:
    """A checkpoint with random weights, in bf16."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02)

    tensors = {"model.embed_tokens.weight": matrix(shape.vocab, h), "model.norm.weight": torch.ones(h).bfloat16()}
    for index in range(shape.layers):
        at = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{norm}.weight"] = torch.ones(h).bfloat16()
        for name, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, columns)
        for name, rows, columns in (("gate", shape.inner, h), ("up", shape.inner, h), ("down", h, shape.inner)):
            tensors[f"{at}mlp.{name}_proj.weight"] = matrix(rows, columns)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": h,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 2 * shape.prompt_tokens,
        "vocab_size": shape.vocab,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))


class Recorder:
    """In place of the outbox: says when each token was sampled."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def token(self, _session: str, token: Any) -> None:
        self._pipe.send(("token", (token.request_id, token.epoch), token.index, time.monotonic()))

    def failed(self, _session: str, failure: Any) -> None:
        self._pipe.send(("failed", (failure.request_id, failure.epoch), failure.message, 0.0))

    def transfer_failed(self, _session: str, key: Any, reason: str, _mismatch: bool) -> None:
        self._pipe.send(("failed", key, reason, 0.0))

    def quiet(self, *_: Any) -> None:
        """What a router would be told besides."""

    accepted = committed = stats = blocks = flush = quiet


class Held:
    """The sender, but nothing leaves before the whole prompt is computed (`after`), or ever (`none`)."""

    def __init__(self, sender: Any, on_event: Callable[[Any], None]) -> None:
        self.mode = "overlapped"
        self._sender = sender
        self._on_event = on_event

    def ready(self, key: Any, tokens: int, layers: range | None = None) -> None:
        if self.mode == "overlapped":
            self._sender.ready(key, tokens, layers)

    def begin(self, *args: Any) -> None:
        if self.mode != "none":
            self._sender.begin(*args)

    def commit(self, key: Any, token: Any) -> None:
        from lanewise.transfer import Delivered

        if self.mode == "none":
            self._on_event(Delivered(key))
        else:
            self._sender.commit(key, token)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sender, name)


def worker(role: str, core: int, model: str, dtype: str, pool_bytes: int, pipe: Connection) -> None:
    from lanewise.config import WorkerConfig
    from lanewise.engine.runner import Engine
    from lanewise.policy.batching import make_batch_policy
    from lanewise.policy.cost import CostModel
    from lanewise.rpc.process import settle_collector
    from lanewise.transfer import Endpoint, Faults, Receiver, Sender

    config = WorkerConfig(model=model, dtype=dtype, cores=(core,), threads=1, kv_cache_bytes=pool_bytes)
    engine = Engine.load(config)
    layout = engine.pool.layout
    engine.warm_up()
    endpoint = Endpoint(role, engine.fingerprint, engine.fingerprint_fields, layout)
    policy = make_batch_policy("lanewise", max_batch_tokens=512, cost=CostModel())
    outbox: Any = Recorder(pipe)
    held: Held | None = None
    if role == "prefill":
        from lanewise.prefill_worker.loop import PrefillLoop

        loop: Any = PrefillLoop(engine, policy, outbox, Faults(), ttft_target_s=60.0)
        sender = Sender(endpoint, engine.pool, loop.on_transfer)
        held = Held(sender, loop.on_transfer)
        loop.attach_sender(held)
        sender.start()
        pipe.send(("up", "", layout.bytes_per_token))
    else:
        from lanewise.decode_worker.loop import DecodeLoop

        receiver = Receiver(endpoint, engine.pool, lambda event: loop.on_transfer(event))
        address = receiver.start()
        loop = DecodeLoop(engine, policy, receiver, outbox, Faults(), max_running=16, ttft_target_s=60.0)
        pipe.send(("up", address, layout.bytes_per_token))
    settle_collector()
    loop.start()
    while (order := pipe.recv()) is not None:
        what, argument = order
        if what == "mode" and held is not None:
            held.mode = argument
        elif what == "peers":
            loop.set_peers(argument)
        else:
            loop.submit("s", argument)
    loop.stop(5.0)
    os._exit(0)  # transfer threads hold nothing worth a farewell


class Pair:
    def __init__(self, directory: str, shape: Shape) -> None:
        context = mp.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        self.shape = shape
        self.pipes: dict[str, Connection] = {}
        self.processes = []
        for role, core in (("prefill", cores[0]), ("decode", cores[1 % len(cores)])):
            self.pipes[role], theirs = context.Pipe()
            held = max(3 * (shape.prompt_tokens + 64), (CROWD + 1) * (shape.crowd_tokens + 64))
            args = (role, core, directory, shape.dtype, held * shape.token_bytes, theirs)
            process = context.Process(target=worker, args=args, daemon=True)
            process.start()
            self.processes.append(process)
        self.address = ""
        for role, pipe in self.pipes.items():
            _, address, self.bytes_per_token = self._next(pipe, 300)
            self.address = address if role == "decode" else self.address
        self.pipes["prefill"].send(("peers", ((self.address, "decode", ""),)))
        self._number = 0
        self._dice = random.Random(1)
        time.sleep(1.0)  # HELLO and the test blocks

    @staticmethod
    def _next(pipe: Connection, timeout_s: float) -> tuple[Any, ...]:
        if not pipe.poll(timeout_s):
            raise TimeoutError(f"a worker said nothing for {timeout_s} s")
        message: tuple[Any, ...] = pipe.recv()
        return message

    def ask(self, mode: str, count: int, tokens: int) -> tuple[float, float]:
        """Seconds until the last first token and until the last second token of `count` prompts at once."""
        from lanewise.request import Mode, Partner, Sampling, Submission

        self.pipes["prefill"].send(("mode", mode))
        sampling = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)
        names = []
        orders = []
        for _ in range(count):
            self._number += 1
            name = f"r{self._number}"
            ids = tuple(self._dice.randrange(1, self.shape.vocab) for _ in range(tokens))
            names.append(name)

            def order(what: Mode, partner: Partner | None, name: str = name, ids: tuple[int, ...] = ids) -> Submission:
                return Submission(name, 1, what, ids, (), sampling, partner, 600.0, None)

            if mode == "local":
                orders.append(("decode", order(Mode.LOCAL, None)))
            else:
                if mode != "none":
                    orders.append(("decode", order(Mode.DECODE, Partner("", "prefill"))))
                orders.append(("prefill", order(Mode.PREFILL, Partner(self.address, "decode"))))
        started = time.monotonic()
        for role, submission in orders:
            self.pipes[role].send(("submit", submission))
        if mode == "local":
            at = self._tokens("decode", names, (0, 1, 2))
        else:
            at = self._tokens("prefill", names, (0,))
            at |= {} if mode == "none" else self._tokens("decode", names, (1, 2))
        return at[0] - started, at.get(1, at[0]) - started

    def _tokens(self, role: str, names: list[str], indices: tuple[int, ...]) -> dict[int, float]:
        """When the last of these requests got each of these tokens."""
        at: dict[int, list[float]] = {index: [] for index in indices}
        while any(len(times) < len(names) for times in at.values()):
            what, key, number, when = self._next(self.pipes[role], 300)
            if what != "token":
                raise RuntimeError(f"{role}: {key}: {number}")
            if key[0] in names:
                at[number].append(when)
        return {index: max(times) for index, times in at.items()}

    def close(self) -> None:
        for pipe in self.pipes.values():
            pipe.send(None)
        for process in self.processes:
            process.join(10)


def measure(name: str, rounds: int) -> dict[str, Any]:
    shape = SHAPES[name]
    started = time.monotonic()
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in (*MODES, "with", "none")}
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), shape)
        pair = Pair(directory, shape)
        for number in range(rounds + 1):
            for mode in MODES:
                taken = pair.ask(mode, 1, shape.prompt_tokens)
                if number:  # the first round warms up
                    times[mode].append(taken)
        for _ in range(rounds):
            for label, mode in (("with", "overlapped"), ("none", "none")):
                times[label].append(pair.ask(mode, CROWD, shape.crowd_tokens))
        pair.close()
    prefill = statistics.median(first for first, _ in times["local"])
    delays = {
        mode: statistics.median(late - early for (_, late), (_, early) in zip(times[mode], times["local"], strict=True))
        for mode in ("overlapped", "after")
    }
    crowds = zip(times["with"], times["none"], strict=True)
    return {
        "shape": f"{shape.what}, {shape.dtype}: {pair.bytes_per_token // 1024} KiB per token",
        "tokens": shape.prompt_tokens,
        "crowd_tokens": shape.crowd_tokens,
        "prefill_s": prefill,
        "delay_s": delays,
        "delay_of_prefill": {mode: delay / prefill for mode, delay in delays.items()},
        "overlapped_of_after": delays["overlapped"] / delays["after"],
        "throughput_with_8_transfers": statistics.median(alone / loaded for (loaded, _), (alone, _) in crowds),
        "rounds": rounds,
        "taken_s": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    for name in args.shape:
        results.append(measure(name, args.rounds))
        if not args.json:
            show(results[-1])
    if args.json:
        print(json.dumps(results))


def show(row: dict[str, Any]) -> None:
    print(f"{row['shape']}, {row['tokens']} tokens; {row['rounds']} rounds in {row['taken_s']:.0f} s")
    print(f"  prefill {row['prefill_s'] * 1000:.0f} ms; second token later than with local prefill:")
    for mode, delay in row["delay_s"].items():
        print(f"    {mode:<11}{delay * 1000:8.1f} ms  {100 * row['delay_of_prefill'][mode]:6.1f} % of prefill")
    print(f"  overlapped / after: {100 * row['overlapped_of_after']:.0f} %")
    share = 100 * row["throughput_with_8_transfers"]
    print(
        f"  prefill throughput with {CROWD} transfers of {row['crowd_tokens']} tokens: {share:.1f} % of none",
        flush=True,
    )


if __name__ == "__main__":
    main()
