"""Starts real services for tests, watches their processes, and proves that nothing is left behind.

Owns: one `lanewise up` per `Service`, its state directory, its log, and a small streaming client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc

READY_S = 90.0
STOP_S = 30.0


@dataclass
class Generated:
    """Everything one stream said."""

    choice: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finished: list[pb.Finished] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # when each token came

    @property
    def reason(self) -> str:
        assert len(self.finished) == 1, f"{len(self.finished)} endings: {self.finished}"
        return self.finished[0].reason


class Service:
    def __init__(self, process: subprocess.Popen[bytes], state_dir: Path, log: Path) -> None:
        self.process = process
        self.state_dir = state_dir
        self.log = log

    # ------------------------------------------------------------ processes

    @property
    def record(self) -> dict[str, Any]:
        files = list(self.state_dir.glob("*.json"))
        return json.loads(files[0].read_text()) if files else {}

    def process_of(self, name: str) -> dict[str, Any]:
        """By process name (`prefill-0`) or role."""
        for entry in self.record["processes"]:
            if name in (entry["name"], entry["role"]):
                return entry
        raise KeyError(name)

    def pid(self, name: str) -> int:
        return int(self.process_of(name)["pid"])

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    @property
    def http(self) -> str:
        return f"http://{self.record['http']}"

    @property
    def grpc(self) -> str:
        return str(self.record["grpc"])

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    # ------------------------------------------------------------ fleet state

    def snapshot(self) -> pb.FleetReply:
        with grpc.insecure_channel(self.grpc) as channel:
            return pb_grpc.FleetStub(channel).Snapshot(pb.FleetRequest(), timeout=5)

    def metric(self, name: str, **labels: str) -> float:
        """Sum over all series of that name with those labels."""
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in found if all(part in line for part in wanted))

    def audit(self, timeout_s: float = 15.0) -> None:
        """Waits until every worker is idle, then asserts that no block is referenced or leaked."""
        last = ""

        def sound() -> bool:
            nonlocal last
            reply = self.snapshot()
            last = str(reply)
            live = [worker for worker in reply.workers if worker.ready]
            return bool(live) and all(
                worker.stats.queued_requests == worker.stats.running_requests == worker.stats.transfers == 0
                and worker.stats.kv_used_tokens == 0
                and worker.stats.leaked_blocks == 0
                for worker in live
            )

        until(sound, timeout_s, lambda: f"pools are not clean when idle:\n{last}")
        assert "kv_pool_audit_failed" not in self.read_log()

    def stop(self) -> int:
        """Ctrl-C; asserts that no process is left."""
        children = [entry["pid"] for entry in self.record.get("processes", []) if entry["pid"]]
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the service did not stop:\n{self.read_log()[-4000:]}") from None
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists() and process_state(pid) != "Z"]
        assert not alive, f"left behind: {alive}"
        return code


@contextlib.contextmanager
def running(
    directory: Path,
    file: Path | None = None,
    *,
    env: dict[str, str] | None = None,
    ready: bool = True,
) -> Iterator[Service]:
    """A service for the duration of the block; `directory` keeps its state and log."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    command = [sys.executable, "-m", "lanewise", "up", *([str(file)] if file else [])]
    command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--log-format", "json"]
    environment = {**os.environ, "LANEWISE_STATE_DIR": str(directory), "PYTHONUNBUFFERED": "1", **(env or {})}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
    service = Service(process, directory, log)
    try:
        if ready:
            until(
                lambda: process.poll() is not None or service.record.get("ready", False),
                READY_S,
                lambda: f"not ready:\n{service.read_log()[-4000:]}",
            )
            assert process.poll() is None, service.read_log()[-4000:]
        yield service
    finally:
        service.stop()


def service_file(directory: Path, **spec: Any) -> Path:
    """An LLMService with the built-in model and the given spec fields."""
    directory.mkdir(parents=True, exist_ok=True)
    resource = {
        "apiVersion": "lanewise.io/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": "e2e"},
        "spec": {"model": {"uri": "builtin://fable"}, **spec},
    }
    path = directory / "service.yaml"
    path.write_text(json.dumps(resource))  # JSON is YAML
    return path


# ---------------------------------------------------------------- client


def request(prompt: str | Sequence[int], **sampling: Any) -> pb.GenerateRequest:
    """`ids` or text; `n`, `stop` and `model` are taken out of the sampling options."""
    message = pb.GenerateRequest(model=sampling.pop("model", ""), n=sampling.pop("n", 1))
    message.stop.extend(sampling.pop("stop", []))
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    for name, value in sampling.items():
        field_value = getattr(message.sampling, name)
        if hasattr(field_value, "extend"):
            field_value.extend(value)
        elif isinstance(value, dict):
            field_value.update(value)
        else:
            setattr(message.sampling, name, value)
    return message


async def generate(
    stub: pb_grpc.InferenceStub,
    message: pb.GenerateRequest,
    *,
    on_token: Callable[[int], None] | None = None,
    timeout_s: float = 120.0,
) -> list[Generated]:
    """All choices of one request; `on_token` is called with the number of tokens so far (choice 0)."""
    choices = [Generated(choice=index) for index in range(max(1, message.n))]
    async for event in stub.Generate(message, timeout=timeout_s):
        match event.WhichOneof("event"):
            case "delta":
                choice = choices[event.delta.choice]
                choice.text += event.delta.text
                choice.logprobs += event.delta.logprobs
                for token_id in event.delta.token_ids:
                    choice.token_ids.append(token_id)
                    choice.at.append(time.monotonic())
                    if on_token and choice.choice == 0:
                        on_token(len(choice.token_ids))
            case "finished":
                choices[event.finished.choice].finished.append(event.finished)
    return choices


async def generate_all(address: str, messages: Sequence[pb.GenerateRequest], **options: Any) -> list[Generated]:
    """All requests at once; the first choice of each."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(generate(stub, message, **options)) for message in messages]
        return [task.result()[0] for task in tasks]


# ---------------------------------------------------------------- waiting


def until(condition: Callable[[], object], timeout_s: float, problem: Callable[[], str]) -> None:
    """Polls; fails with the problem in words when the deadline passes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, problem()
        time.sleep(0.02)


def process_state(pid: int) -> str:
    """The kernel's letter: R, S, T (stopped), Z …; X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
