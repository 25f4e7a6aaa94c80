"""What a transfer costs where it can be seen: the second token, and the throughput of prefill.

    python benchmarks/overlap.py [--shape small wide] [--rounds 3] [--channel Auto Direct] [--json]

A prefill and a decode worker are two processes with the real loops, one core each, and no router. Three ways take turns
with fresh prompts: `local` (the decode worker prefills), `overlapped` (as served), and `after` (nothing is sent before
the whole prompt is computed). Delay: second token later than with `local`, round by round. Then eight prompts at once,
with transfers and with a sender that sends nothing.

A prefill of seconds varies by more than a transfer takes. So the delay is measured in a second way, of which the
prefill's own time is no part: what its parts are seen to cost.
- `gap`: from the first token to the second one, less the same with `local`: what is left to be sent by then.
- `taken`: CPU time that other threads than the engine's took in the process that computed the prompt, less the same
  with `local`. They share its one core, so that the prompt took so much longer. What caches and the memory bus are
  slower for it is not in it; the throughput with eight transfers holds that too.
Rounds count once the workers know what batches take and all memory of the pools has been used.
`--channel` as of benchmarks/kv_channel.py; several take turns in one run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import statistics
import tempfile
import threading
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
WARM_ROUNDS = 4  # the pools hold three prompts
FIRST_TOKENS = range(200, 440, 20)  # lengths of the prompts that the cost model is fitted to before


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


@dataclass(frozen=True)
class Times:
    """Seconds since the request: of the first and the second token, and CPU time of other threads until the first."""

    first: float
    second: float
    taken: float

    @property
    def gap(self) -> float:
        return self.second - self.first


class Recorder:
    """In place of the outbox: says when each token was sampled, and what other threads had taken by then."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._clock = 0
        self._base = 0.0

    def of_engine(self, thread: threading.Thread) -> None:
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)

    def begin(self) -> None:
        self._base = self._others()

    def _others(self) -> float:
        return time.process_time() - time.clock_gettime(self._clock)

    def token(self, _session: str, token: Any) -> None:
        now, taken = time.monotonic(), self._others() - self._base
        self._pipe.send(("token", (token.request_id, token.epoch), token.index, (now, taken)))

    def failed(self, _session: str, failure: Any) -> None:
        self._pipe.send(("failed", (failure.request_id, failure.epoch), failure.message, None))

    def transfer_failed(self, _session: str, key: Any, reason: str, _mismatch: bool) -> None:
        self._pipe.send(("failed", key, reason, None))

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


def worker(role: str, core: int, model: str, dtype: str, pool_bytes: int, channel: str, pipe: Connection) -> None:
    from lanewise.config import WorkerConfig
    from lanewise.engine.runner import Engine
    from lanewise.policy.batching import make_batch_policy
    from lanewise.policy.cost import CostModel
    from lanewise.rpc.process import settle_collector
    from lanewise.transfer import Endpoint, Faults, Receiver, Sender
    from lanewise.transfer.trial import References

    config = WorkerConfig(model=model, dtype=dtype, cores=(core,), threads=1, kv_cache_bytes=pool_bytes)
    engine = Engine.load(config)
    layout = engine.pool.layout
    engine.warm_up()
    endpoint = Endpoint(role, engine.fingerprint, engine.fingerprint_fields, layout)
    policy = make_batch_policy("lanewise", max_batch_tokens=config.max_batch_tokens, cost=CostModel())
    recorder = Recorder(pipe)
    outbox: Any = recorder
    direct = channel != "ZeroMQ"
    held: Held | None = None
    if role == "prefill":
        from lanewise.prefill_worker.loop import PrefillLoop

        loop: Any = PrefillLoop(engine, policy, outbox, Faults(), ttft_target_s=60.0)
        references = References.AUTO if channel == "Auto" else References.NEVER
        sender = Sender(endpoint, engine.pool, loop.on_transfer, direct=direct, references=references)
        held = Held(sender, loop.on_transfer)
        loop.attach_sender(held)
        sender.start()
        pipe.send(("up", "", layout.bytes_per_token))
    else:
        from lanewise.decode_worker.loop import DecodeLoop

        receiver = Receiver(endpoint, engine.pool, lambda event: loop.on_transfer(event), direct=direct)
        address = receiver.start()
        loop = DecodeLoop(engine, policy, receiver, outbox, Faults(), max_running=16, ttft_target_s=60.0)
        pipe.send(("up", address, layout.bytes_per_token))
    settle_collector()
    loop.start()
    recorder.of_engine(loop._thread)
    while (order := pipe.recv()) is not None:
        what, argument = order
        if what == "mode" and held is not None:
            held.mode = argument
        elif what == "peers":
            loop.set_peers(argument)
        else:
            recorder.begin()
            loop.submit("s", argument)
    loop.stop(5.0)
    os._exit(0)  # transfer threads hold nothing worth a farewell


class Pair:
    def __init__(self, directory: str, shape: Shape, channel: str) -> None:
        context = mp.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        self.shape = shape
        self.pipes: dict[str, Connection] = {}
        self.processes = []
        for role, core in (("prefill", cores[0]), ("decode", cores[1 % len(cores)])):
            self.pipes[role], theirs = context.Pipe()
            held = max(3 * (shape.prompt_tokens + 64), (CROWD + 1) * (shape.crowd_tokens + 64))
            args = (role, core, directory, shape.dtype, held * shape.token_bytes, channel, theirs)
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
        time.sleep(2.0)  # HELLO and the test blocks

    @staticmethod
    def _next(pipe: Connection, timeout_s: float) -> tuple[Any, ...]:
        if not pipe.poll(timeout_s):
            raise TimeoutError(f"a worker said nothing for {timeout_s} s")
        message: tuple[Any, ...] = pipe.recv()
        return message

    def ask(self, mode: str, count: int, tokens: int) -> Times:
        """Of the last first token and the last second token of `count` prompts at once."""
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
        (first, taken), (second, _) = at[0], at.get(1, at[0])
        return Times(first - started, second - started, taken)

    def _tokens(self, role: str, names: list[str], indices: tuple[int, ...]) -> dict[int, tuple[float, float]]:
        """When the last of these requests got each of these tokens, and what other threads had taken by then."""
        at: dict[int, list[tuple[float, float]]] = {index: [] for index in indices}
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


def measure(name: str, channels: list[str], rounds: int) -> list[dict[str, Any]]:
    shape = SHAPES[name]
    started = time.monotonic()
    local: list[Times] = []
    times: dict[tuple[str, str], list[Times]] = {}
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), shape)
        pairs = {channel: Pair(directory, shape, channel) for channel in channels}
        for pair in pairs.values():
            for tokens in FIRST_TOKENS:
                pair.ask("none", 1, tokens)
        for number in range(WARM_ROUNDS + rounds):
            asked = [pairs[channels[0]].ask("local", 1, shape.prompt_tokens)]
            for channel, pair in pairs.items():
                for mode in MODES[1:]:
                    asked.append(pair.ask(mode, 1, shape.prompt_tokens))
                    if number >= WARM_ROUNDS:
                        times.setdefault((channel, mode), []).append(asked[-1])
            local += asked[: number >= WARM_ROUNDS]
        for _ in range(rounds):
            for channel, pair in pairs.items():
                for label, mode in (("with", "overlapped"), ("none", "none")):
                    times.setdefault((channel, label), []).append(pair.ask(mode, CROWD, shape.crowd_tokens))
        for pair in pairs.values():
            pair.close()
    what = {
        "shape": f"{shape.what}, {shape.dtype}: {pair.bytes_per_token // 1024} KiB per token",
        "tokens": shape.prompt_tokens,
        "crowd_tokens": shape.crowd_tokens,
        "prefill_s": statistics.median(each.first for each in local),
        "rounds": rounds,
        "taken_s": time.monotonic() - started,
    }
    return [what | of_channel(channel, times, local) for channel in channels]


def of_channel(channel: str, times: dict[tuple[str, str], list[Times]], local: list[Times]) -> dict[str, Any]:
    """What one channel costs: both delays, and the throughput beside eight transfers."""
    prefill = statistics.median(each.first for each in local)
    delays, parts = {}, {}
    for mode in MODES[1:]:
        rounds = list(zip(times[channel, mode], local, strict=True))
        delays[mode] = statistics.median(ours.second - alone.second for ours, alone in rounds)
        parts[mode] = {
            "gap": statistics.median(ours.gap - alone.gap for ours, alone in rounds),
            "taken": statistics.median(ours.taken - alone.taken for ours, alone in rounds),
        }
    seen = {mode: sum(each.values()) for mode, each in parts.items()}
    crowds = zip(times[channel, "with"], times[channel, "none"], strict=True)
    return {
        "channel": channel,
        "delay_s": delays,
        "delay_of_prefill": {mode: delay / prefill for mode, delay in delays.items()},
        "overlapped_of_after": delays["overlapped"] / delays["after"],
        "parts_s": parts,
        "parts_of_prefill": {mode: delay / prefill for mode, delay in seen.items()},
        "parts_overlapped_of_after": seen["overlapped"] / seen["after"],
        "throughput_with_8_transfers": statistics.median(alone.first / loaded.first for loaded, alone in crowds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channel", nargs="+", choices=["Auto", "Direct", "ZeroMQ"], default=["Auto"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    for name in args.shape:
        rows = measure(name, args.channel, args.rounds)
        results += rows
        if not args.json:
            show(rows)
    if args.json:
        print(json.dumps(results))


def show(rows: list[dict[str, Any]]) -> None:
    what = rows[0]
    print(f"{what['shape']}, {what['tokens']} tokens; {what['rounds']} rounds in {what['taken_s']:.0f} s")
    print(f"  prefill {what['prefill_s'] * 1000:.0f} ms; second token later than with local prefill:")
    for row in rows:
        print(f"  {row['channel']}")
        for mode, delay in row["delay_s"].items():
            gap, taken = (1000 * row["parts_s"][mode][part] for part in ("gap", "taken"))
            print(
                f"    {mode:<11}{delay * 1000:8.1f} ms  {100 * row['delay_of_prefill'][mode]:6.1f} % of prefill; "
                f"gap {gap:.1f} + taken {taken:.1f} ms, {100 * row['parts_of_prefill'][mode]:.2f} %"
            )
        print(f"    overlapped / after: {100 * row['overlapped_of_after']:.0f} %, ", end="")
        print(f"of gap + taken {100 * row['parts_overlapped_of_after']:.0f} %")
        share = 100 * row["throughput_with_8_transfers"]
        print(
            f"    prefill throughput with {CROWD} transfers of {row['crowd_tokens']} tokens: {share:.1f} % of none",
            flush=True,
        )


if __name__ == "__main__":
    main()
