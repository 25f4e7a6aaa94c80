"""Many requests with one prompt on a decode worker that prefills locally: the cache grows while they wait.

What a queued prompt finds in the cache when it starts is more than when it was queued. The policy must learn that, or
it plans tokens that are computed already, and the request is stepped twice.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e import models
from tests.e2e.processes import Process, free_port, snapshot
from tests.e2e.service import generate_all, request, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
PROMPT = [20 + i % 200 for i in range(400)]
LONG = [30 + i % 300 for i in range(1900)]
TOKENS = 24


def test_every_answer_is_the_undisturbed_one(tmp_path: Path) -> None:
    [expected] = models.oracle(models.FABLE, [PROMPT], TOKENS)
    worker_at, router_at = (f"127.0.0.1:{free_port()}" for _ in range(2))
    flags = ("--grpc", router_at, "--http", f"127.0.0.1:{free_port()}", "--workers", worker_at)
    worker = Process("decode_worker", tmp_path / "d.log", "--listen", worker_at, "--cores", "0")
    with worker, Process("router", tmp_path / "r.log", *flags, "--disaggregation", "Never"):
        worker.wait_ready()
        until(lambda: any(one.ready for one in snapshot(router_at).workers), 60, lambda: "no worker")
        # While the long one computes, all the others queue, and nothing of theirs is cached yet.
        prompts = [LONG, *([PROMPT] * 16)]
        messages = [request(ids, max_tokens=TOKENS, temperature=0.0, ignore_eos=True) for ids in prompts]
        results = asyncio.run(generate_all(router_at, messages))
    assert [result.token_ids for result in results[1:]] == [expected] * 16
