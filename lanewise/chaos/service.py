"""The service a campaign runs against: one `lanewise up` with fault hooks on, in a directory of its own.

Owns: its start and end, who its processes are, whether they are ready, and what its pools hold when all is quiet.
Must not: do harm (inject.py) or ask for tokens (traffic.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from lanewise.cli import CommandFailed
from lanewise.local.commands import SELF
from lanewise.local.keys import make_keys
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc

READY_S = 180.0
STOP_S = 30.0
POLL_S = 0.02
PAGE_TOKENS = 16
KV_CACHE = "48Mi"
"""Some ten thousand tokens of the built-in model in fp32: enough for the load, little enough that caches turn over."""


@dataclass(slots=True)
class Service:
    directory: Path
    supervisor: subprocess.Popen[bytes]
    workers: tuple[str, ...]
    stopped: set[int] = field(default_factory=set)  # pids that wait for SIGCONT

    @property
    def record(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.directory / "chaos.json").read_text())
        except FileNotFoundError:  # not written yet, or the supervisor has gone
            return {}
        return found

    @property
    def grpc(self) -> str:
        return str(self.record["grpc"])

    def pid(self, name: str) -> int:
        """0 while it is not running."""
        return next((int(p["pid"]) for p in self.record.get("processes", ()) if p["name"] == name), 0)

    def log_tail(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-3000:]

    async def snapshot(self) -> pb.FleetReply:
        async with grpc.aio.insecure_channel(self.grpc) as channel:
            reply: pb.FleetReply = await pb_grpc.FleetStub(channel).Snapshot(  # type: ignore[no-untyped-call]
                pb.FleetRequest(), timeout=5
            )
            return reply

    async def whole(self) -> bool:
        """Every worker runs, and the router routes to the very processes the supervisor knows."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            ready = {w.description.pid for w in (await self.snapshot()).workers if w.ready}
            return ready == {self.pid(name) for name in self.workers} and 0 not in ready
        return False

    async def leaked_blocks(self, timeout_s: float = 30.0) -> int:
        """What is still taken, or taken for lost, once nothing runs."""
        left = -1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while left != 0:
                    await asyncio.sleep(0.2)
                    stats = [worker.stats for worker in (await self.snapshot()).workers if worker.ready]
                    busy = sum(s.queued_requests + s.running_requests + s.transfers for s in stats)
                    pages = sum(s.leaked_blocks + -(-s.kv_used_tokens // PAGE_TOKENS) for s in stats)
                    left = busy + pages if len(stats) == len(self.workers) else -1
        audited = '"kv_pool_audit_failed"' in (self.directory / "log").read_text(errors="replace")
        return max(left, 0) + audited + (left < 0)


async def until(condition: Callable[[], Any], timeout_s: float, problem: Callable[[], str]) -> None:
    """Polls; CommandFailed with the problem in words when the time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                value = condition()
                if (await value) if asyncio.iscoroutine(value) else value:
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise CommandFailed(problem()) from None


@contextlib.asynccontextmanager
async def running(directory: Path, prefill: int, decode: int, encryption: str) -> AsyncIterator[Service]:
    """A service with `prefill` + `decode` workers on the built-in model in fp32, ready; it ends with the block."""
    secret = directory / "secret"
    make_keys(secret)
    workers = (*(f"prefill-{n}" for n in range(prefill)), *(f"decode-{n}" for n in range(decode)))
    log = directory / "log"
    environment = {
        **os.environ,
        "LANEWISE_STATE_DIR": str(directory),
        "LANEWISE_FAULTS": "1",
        "LANEWISE_FAULTS_SPEC": f"@{directory}/faults/",
        "LANEWISE_HEALTHY_AFTER_S": "0",
        "LANEWISE_SECRET_DIR": str(secret),  # unused where nothing is encrypted
    }
    part = {"kvCacheMemory": KV_CACHE}
    resource = {
        "apiVersion": "lanewise.io/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": "chaos"},
        "spec": {
            "model": {"uri": "builtin://fable", "dtype": "float32"},
            "disaggregation": "Always",
            "transfer": {"encryption": encryption},
            "prefill": {"replicas": prefill, **part},
            "decode": {"replicas": decode, **part},
        },
    }
    file = directory / "service.yaml"
    file.write_text(json.dumps(resource))  # JSON is YAML
    command = [*SELF, "up", str(file), "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--log-format", "json"]
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: ASYNC220 (it returns at once; signals go to it from anywhere)
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
    service = Service(directory, process, workers)
    try:
        await until(
            lambda: process.poll() is not None or service.record.get("ready"),
            READY_S,
            lambda: f"the service is not ready after {READY_S:g} s:\n{service.log_tail()}",
        )
        if process.poll() is not None:
            raise CommandFailed(f"the service did not start:\n{service.log_tail()}")
        await until(service.whole, READY_S, lambda: f"the router does not know all workers:\n{service.log_tail()}")
        yield service
    finally:
        _end(service)


def _end(service: Service) -> None:
    for pid in service.stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    if service.supervisor.poll() is None:
        service.supervisor.send_signal(signal.SIGINT)
    try:
        service.supervisor.wait(STOP_S)
    except subprocess.TimeoutExpired:
        service.supervisor.kill()  # its children get the same signal from the kernel
        service.supervisor.wait(STOP_S)
