"""A worker with other weights at the same address: refused by fingerprint, with words that say what differs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lanewise.rpc import lanewise_pb2 as pb
from tests.e2e import models
from tests.e2e.processes import Process, free_port, snapshot
from tests.e2e.service import Generated, generate_all, request, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
PROMPT = list(range(20, 60))
LONG = request(PROMPT, max_tokens=1500, temperature=0.0, ignore_eos=True)


def test_other_weights_at_the_same_address_are_refused_by_name(tmp_path: Path) -> None:
    first = models.make_model("qwen2", tmp_path / "first", seed=1)
    other = models.make_model("qwen2", tmp_path / "other", seed=2)
    [expected_first] = models.oracle(first, [PROMPT], 24)
    [expected_other] = models.oracle(other, [PROMPT], 24)
    assert expected_first != expected_other
    prefill_at, decode_at, grpc_at = (f"127.0.0.1:{free_port()}" for _ in range(3))
    kv_at = f"tcp://127.0.0.1:{free_port()}"

    def decode(directory: Path, log: str) -> Process:
        flags = ("--listen", decode_at, "--kv-listen", kv_at, "--model", str(directory), "--served-name", "m")
        return Process("decode_worker", tmp_path / log, *flags, "--dtype", "float32", "--cores", "1")

    prefill = Process(
        "prefill_worker",
        tmp_path / "prefill.log",
        *("--listen", prefill_at, "--model", str(first), "--served-name", "m", "--dtype", "float32", "--cores", "0"),
    )
    router = Process(
        "router",
        tmp_path / "router.log",
        *("--grpc", grpc_at, "--http", f"127.0.0.1:{free_port()}", "--workers", f"{prefill_at},{decode_at}"),
        *("--disaggregation", "Always", "--hold-timeout-s", "4"),
    )
    with prefill, router:
        with decode(first, "decode-first.log") as worker:
            until(lambda: ready(grpc_at) == 2, 60, lambda: str(snapshot(grpc_at)))
            assert ask(grpc_at).token_ids == expected_first
            streaming, ended = asyncio.run(stream_while(grpc_at, worker))
        # The stream that lived on the first weights may never continue on the others.
        assert streaming >= 10
        assert ended.reason == "error"
        assert ended.finished[0].error.code in ("NO_WORKERS", "WORKER_LOST")
        with decode(other, "decode-other.log") as worker:
            worker.wait_ready()
            until(lambda: failed_link(grpc_at) is not None, 30, lambda: str(snapshot(grpc_at)))
            link = failed_link(grpc_at)
            assert link is not None
            assert "weight_digest" in link.reason, link.reason
            digests = {field_of(grpc_at, role, "weight_digest") for role in ("prefill", "decode")}
            assert len(digests) == 2
            for digest in digests:
                assert digest[:8] in link.reason, "both values are named"
            # New requests are whole on one set of weights: the decode worker prefills them itself.
            assert ask(grpc_at).token_ids == expected_other


def ask(address: str) -> Generated:
    message = request(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True)
    return asyncio.run(generate_all(address, [message]))[0]


async def stream_while(address: str, worker: Process) -> tuple[int, Generated]:
    """A long stream during which the decode worker is killed."""
    seen = 0

    def on_token(count: int) -> None:
        nonlocal seen
        seen = count
        if count == 10:
            worker.kill()

    [result] = await generate_all(address, [LONG], on_token=on_token)
    return seen, result


def ready(address: str) -> int:
    try:
        return sum(worker.ready for worker in snapshot(address).workers)
    except Exception:  # the router is still starting
        return 0


def failed_link(address: str) -> pb.LinkInfo | None:
    """With a worker that is there; a link with the one that died may still be listed."""
    workers = snapshot(address).workers
    there = {worker.description.incarnation for worker in workers}
    links = [link for worker in workers for link in worker.stats.links if link.peer in there]
    return next((link for link in links if link.state == "failed"), None)


def field_of(address: str, role: str, name: str) -> str:
    for worker in snapshot(address).workers:
        if worker.description.role == role:
            return worker.description.fingerprint_fields[name]
    raise AssertionError(f"no {role} worker")
