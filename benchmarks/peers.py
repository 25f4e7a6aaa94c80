"""Lanewise beside another server on the same weights, machine, client and prompts; prints ratios with their spread.

    python benchmarks/peers.py --make /tmp/small                       # a random 118 M Qwen2 to serve, once
    python benchmarks/peers.py /tmp/small --transformers [--vllm PEER/bin/python] [--split] [--repetitions 3]

Every server is started once (start to ready is timed), then each measurement goes round the servers in turn, in another
order each time, and again for every repetition. While one is measured the others idle; vLLM is even stopped (SIGSTOP).
A ratio is Lanewise / peer within one repetition; the table gives the median and the range of them.
`transformers` is here with the development tools; how vLLM is installed docs/performance.md says.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START_S = 600.0
OUTPUT_TOKENS = 64
LIMITS_S = 600.0


@dataclass(frozen=True)
class Load:
    """One measurement: what `lanewise bench` is asked for, and which of its numbers count."""

    name: str
    prompt: str
    concurrency: int
    requests: int
    measures: tuple[tuple[str, float, bool], ...]  # path in the report, wanted ratio, whether more is better


TTFT, ITL = ("ttft_ms.p50", 0.8, False), ("itl_ms.p50", 0.65, False)
LOADS = (
    Load("32 tokens", "32", 1, 8, (TTFT, ITL)),
    Load("128 tokens", "128", 1, 8, (TTFT, ITL)),
    Load("1024 tokens", "1024", 1, 5, (TTFT, ITL)),
    Load("128 tokens x 16", "128", 16, 48, (("itl_ms.p50", 0.85, False), ("output_tokens_per_s", 1.2, True))),
    Load(
        "mixed x 16",
        "80%:64,20%:1536",
        16,
        48,
        (("ttft_ms_by_prompt.64.p50", 0.4, False), ("itl_ms.p99", 0.4, False), ("output_tokens_per_s", 1.1, True)),
    ),
)


@dataclass
class Server:
    """How one server is started, and what was measured on it."""

    name: str
    command: list[str]
    url: str
    ready: str
    environment: dict[str, str] = field(default_factory=dict)
    pausable: bool = False
    process: subprocess.Popen[bytes] | None = None
    start_s: float = 0.0
    found: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)


def main() -> int:
    options = parse()
    if options.make:
        make_model(options.make)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = list(choose(options, folder))
        for server in servers:
            stack.enter_context(running(server, folder))
            print(f"{server.name}: ready after {server.start_s:.1f} s", flush=True)
        for repetition in range(options.repetitions):
            for load in LOADS:
                if not options.only or load.name in options.only:
                    turn = repetition % len(servers)
                    with alone(options.lock):
                        measure(load, [*servers[turn:], *servers[:turn]], repetition)
            report(servers, options.json)  # after each repetition, so that an interrupted run has shown something
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a Hugging Face model directory")
    parser.add_argument("--make", type=Path, metavar="DIR", help="write the random 118 M Qwen2 there and end")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment that holds vLLM for CPUs")
    parser.add_argument("--transformers", action="store_true", help="beside benchmarks/transformers_server.py")
    parser.add_argument("--vllm-flag", action="append", default=[], metavar="FLAG", help="such as --enforce-eager")
    parser.add_argument("--split", action="store_true", help="also 1 prefill + 1 decode worker, a core each")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", action="append", metavar="NAME", help=f"of {', '.join(load.name for load in LOADS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lock", type=Path, metavar="FILE", help="flock it for each measurement, as others here may")
    options = parser.parse_args()
    if not options.make and options.model is None:
        parser.error("give a model directory, or --make one")
    return options


def make_model(directory: Path) -> None:
    """117.8 M parameters, 12 KiB of KV per token in bf16, tied embeddings; the tokenizer knows single bytes."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=768,
        intermediate_size=2688,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32_000,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
    )
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory, config.vocab_size)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Single bytes, three special tokens, and words that no text holds up to the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*(f"<{i}>" for i in range(3)), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<{i}>" for i in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<2>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def choose(options: argparse.Namespace, folder: Path) -> Iterator[Server]:
    model = options.model.resolve()
    yield lanewise("lanewise", "Auto", model, folder)
    if options.split:
        yield lanewise("lanewise 1+1", "Always", model, folder)
    if options.transformers:
        port = free_port()
        command = [sys.executable, "benchmarks/transformers_server.py", str(model), "--port", str(port)]
        url = f"http://127.0.0.1:{port}/v1"
        yield Server("transformers", [*command, "--threads", str(os.cpu_count() or 1)], url, f"{url}/models")
    if options.vllm:
        port = free_port()
        flags = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
        flags += ["--max-model-len", "2048", "--served-model-name", "m", *options.vllm_flag]
        cores = f"0-{(os.cpu_count() or 1) - 1}"
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_NO_USAGE_STATS": "1"}
        command = [options.vllm, "-m", "vllm.entrypoints.cli.main", *flags]
        url = f"http://127.0.0.1:{port}/v1"
        yield Server("vllm", command, url, f"{url}/models", environment, pausable=True)


def lanewise(
    name: str,
    disaggregation: str,
    model: Path,
    folder: Path,
    *,
    kv_memory: str | None = "512Mi",
    context_tokens: int = 2048,
) -> Server:
    workers = {"replicas": 1, **({"kvCacheMemory": kv_memory} if kv_memory else {})}
    spec = {
        "model": {"servedName": "m", "uri": f"file://{model}", "maxContextTokens": context_tokens},
        "disaggregation": disaggregation,
        "prefill": workers,
        "decode": workers,
    }
    resource = {
        "apiVersion": "lanewise.io/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name.replace(" ", "-").replace("+", "-")},
        "spec": spec,
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(resource))  # JSON is YAML
    port, grpc = free_port(), free_port()
    flags = ["--http", f"127.0.0.1:{port}", "--grpc", f"127.0.0.1:{grpc}"]
    command = [sys.executable, "-m", "lanewise", "up", str(file), *flags]
    environment = {"LANEWISE_STATE_DIR": str(folder / f"{name}.state")}
    return Server(name, command, f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{port}/readyz", environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(server: Server, folder: Path) -> Iterator[None]:
    """The server from its start to its end; what it says is shown where it fails."""
    log = folder / f"{server.name}.log"
    with log.open("wb") as sink:
        started = time.perf_counter()
        environment = {**os.environ, **server.environment}
        server.process = subprocess.Popen(
            server.command, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
    try:
        while not answers(server.ready):
            if server.process.poll() is not None or time.perf_counter() - started > START_S:
                raise SystemExit(f"{server.name} did not get ready:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        server.start_s = time.perf_counter() - started
        if server.pausable:
            server.signal(signal.SIGSTOP)
        yield
    finally:
        server.signal(signal.SIGCONT)
        server.signal(signal.SIGTERM)
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.signal(signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
        yield


def measure(load: Load, servers: list[Server], repetition: int) -> None:
    for server in servers:
        if server.pausable:
            server.signal(signal.SIGCONT)
        report = bench(server, load, seed=1 + repetition)
        if server.pausable:
            server.signal(signal.SIGSTOP)
        for path, _, _ in load.measures:
            value = pick(report, path)
            server.found.setdefault((load.name, path), []).append(value)
            print(f"  {load.name:<16} {path:<26} {server.name:<13} {value:10.1f}", flush=True)


def bench(server: Server, load: Load, seed: int) -> dict[str, Any]:
    flags = ["--concurrency", str(load.concurrency), "--requests", str(load.requests), "--seed", str(seed)]
    flags += ["--prompt-tokens", load.prompt, "--output-tokens", str(OUTPUT_TOKENS), "--token-ids", "300-31000"]
    command = [sys.executable, "-m", "lanewise", "bench", server.url, *flags, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS_S, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{server.name}: {done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    if report["failed"]:
        raise SystemExit(f"{server.name}, {load.name}: {report['errors']}")
    return report


def pick(report: Any, path: str) -> float:
    for part in path.split("."):
        report = report[part]
    return float(report)


def report(servers: list[Server], file: Path | None) -> None:
    ours, others = servers[0], servers[1:]
    print(f"\n{'start to ready, s':<44}" + "".join(f"{server.name} {server.start_s:.1f}  " for server in servers))
    for load in LOADS:
        for path, wanted, more in load.measures:
            values = ours.found.get((load.name, path))
            if not values:
                continue
            line = f"{load.name:<16} {path:<27}{statistics.median(values):9.1f}"
            for other in others:
                theirs = other.found[load.name, path]
                ratios = sorted(mine / its for mine, its in zip(values, theirs, strict=True))
                line += f"   {other.name} {statistics.median(theirs):.1f}, ratio {statistics.median(ratios):.2f}"
                line += f" ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            print(line + f"   wanted beside vLLM {'>=' if more else '<='} {wanted}")
    if file is not None:
        found = [
            {"load": key[0], "measure": key[1], server.name: v} for server in servers for key, v in server.found.items()
        ]
        file.write_text(json.dumps({"start_s": {s.name: s.start_s for s in servers}, "found": found}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
