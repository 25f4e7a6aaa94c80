"""The router as a process: what it imports, its memory, its ready line, signals, and refusing to start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.router.scripted import DEADLINE_S, ScriptedWorker, story, until

MAX_RSS_MIB = 120


class Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    async def line(self, event: str) -> dict[str, Any]:
        """The next log line of that event."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            async for raw in self.process.stdout:
                self.lines.append(json.loads(raw))
                if self.lines[-1]["event"] == event:
                    return self.lines[-1]
        raise AssertionError(f"no {event!r} among {self.lines}")

    async def exit(self) -> int:
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def started(*flags: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lanewise.router", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", *flags),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Process(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]  # else its pipe outlives the loop


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


async def test_serves_within_its_memory_and_drains() -> None:
    worker = await ScriptedWorker("decode").start()
    go = asyncio.Event()

    async def slow(submit: Any) -> None:
        worker.tokens(submit, 0, 4)
        await go.wait()
        worker.tokens(submit, 4, 30)

    async with started("--workers", worker.address) as router, aiohttp.ClientSession() as http:
        ready = await router.line("ready")
        assert (await router.line("routable"))["models"] == ["fable"]
        body = {"model": "fable", "prompt": "x", "max_tokens": 30}
        for _ in range(50):
            async with http.post(ready["http"] + "/v1/completions", json=body) as response:
                assert (await response.json())["choices"][0]["text"] == story(30)
        assert resident_mib(router.process.pid) < MAX_RSS_MIB
        worker.on_submit = slow
        answer = asyncio.create_task(http.post(ready["http"] + "/v1/completions", json=body))
        await until(lambda: len(worker.submits) == 51)
        router.process.send_signal(signal.SIGTERM)
        await router.line("draining")
        async with http.post(ready["http"] + "/v1/completions", json=body) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "DRAINING")
        go.set()
        assert (await (await answer).json())["choices"][0]["text"] == story(30)
        assert await router.exit() == 0
    await worker.stop()


async def test_a_second_signal_ends_the_drain_with_an_answer_to_everyone() -> None:
    worker = await ScriptedWorker("decode").start()
    worker.on_submit = worker.silent
    async with started("--workers", worker.address) as router, aiohttp.ClientSession() as http:
        ready = await router.line("ready")
        await router.line("routable")
        body = {"model": "fable", "prompt": "x"}
        answer = asyncio.create_task(http.post(ready["http"] + "/v1/completions", json=body))
        await until(lambda: worker.submits)
        router.process.send_signal(signal.SIGINT)
        await router.line("draining")
        router.process.send_signal(signal.SIGINT)
        response = await answer
        assert (response.status, (await response.json())["error"]["code"]) == (503, "DRAINING")
        assert await router.exit() == 0
    await worker.stop()


def test_imports_neither_torch_nor_numpy() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import lanewise.router.main"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert names & {"torch", "numpy", "transformers", "kubernetes", "kopf", "opentelemetry"} == set()
    assert "grpc" in names


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--http", "nonsense"], "not host:port"),
        (["--api-keys-file", "/does/not/exist"], "API keys"),
        (["--retry-budget", "-1"], "retry_budget"),
    ],
)
def test_refuses_to_start(flags: list[str], words: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lanewise.router", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        check=False,
    )
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
