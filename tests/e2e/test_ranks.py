"""A worker of two ranks: the same text, KV to a worker of one, and what happens when a rank is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.e2e import models
from tests.e2e.processes import Process, free_port, snapshot
from tests.e2e.service import generate_all, request, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
PROMPT = list(range(20, 160))


def test_two_ranks_prefill_for_one_and_end_together(tmp_path: Path) -> None:
    directory = models.make_model("qwen2", tmp_path / "model", seed=1)
    [expected] = models.oracle(directory, [PROMPT], 24)
    prefill_at, decode_at, grpc_at = (f"127.0.0.1:{free_port()}" for _ in range(3))
    model = ("--model", str(directory), "--served-name", "m", "--dtype", "float32", "--kernels", "torch")

    def ask() -> list[int]:
        message = request(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True)
        return asyncio.run(generate_all(grpc_at, [message]))[0].token_ids

    prefill = Process(
        "prefill_worker", tmp_path / "prefill.log", "--listen", prefill_at, *model, "--tensor-parallel", "2"
    )
    decode = Process("decode_worker", tmp_path / "decode.log", "--listen", decode_at, *model)
    router = Process(
        "router",
        tmp_path / "router.log",
        *("--grpc", grpc_at, "--http", f"127.0.0.1:{free_port()}", "--workers", f"{prefill_at},{decode_at}"),
        *("--disaggregation", "Always", "--hold-timeout-s", "4"),
    )
    with router, decode, prefill:
        until(lambda: ready(grpc_at) == 2, 90, lambda: str(snapshot(grpc_at)))
        assert ask() == expected
        (rank,) = children(prefill.popen.pid)
        os.kill(rank, signal.SIGKILL)
        assert prefill.popen.wait(20) == 1, "a worker without one of its ranks ends, and is started again"
        assert ask() == expected, "the decode worker serves alone"


def children(parent: int) -> list[int]:
    """Processes that `parent` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def ready(address: str) -> int:
    try:
        return sum(worker.ready for worker in snapshot(address).workers)
    except Exception:  # the router is still starting
        return 0
