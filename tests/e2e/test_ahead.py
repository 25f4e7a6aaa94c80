"""Decode workers that launch a step before the tokens of the one before are known: the same text, through processes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import grpc
import pytest

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.e2e.service import Service, generate_all, request, running, service_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
BYTES_PER_TOKEN = 5120  # fable in fp32: 5 layers, K and V, 2 heads of 64
POOL_TOKENS = 600
NAMES = "a fox, a crow and the moon"


def messages() -> list[pb.GenerateRequest]:
    """Every kind of end, and more of them than the pool holds at once."""
    common = {"max_tokens": 150}
    return [
        *(request(f"Fable {i}: {NAMES}", temperature=0.9, seed=i, ignore_eos=True, **common) for i in range(3)),
        request(f"Once upon a time, {NAMES}", temperature=0.0, max_tokens=400),
        request(f"Once upon a time, {NAMES}", temperature=0.0, stop=["the"], **common),
        request(f"Twice, {NAMES}", temperature=0.7, seed=5, frequency_penalty=0.8, top_p=0.9, **common),
        request([50 + i for i in range(90)], temperature=0.0, max_tokens=1),
        request([70 + i for i in range(90)], temperature=1.0, seed=2, min_tokens=30, **common),
    ]


async def leave_some(address: str, seed: int) -> None:
    """Clients that go away in the middle of their answers, at different tokens."""
    dice = random.Random(seed)

    async def leave(number: int, after: int) -> None:
        stream = stub.Generate(request(f"Story {number} of {NAMES}", max_tokens=300, ignore_eos=True), timeout=60)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen >= after:
                stream.cancel()
                return

    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(leave(number, dice.randrange(1, 25)))


def ask(service: Service, together: bool) -> list[tuple[str, str]]:
    batches = [messages()] if together else [[message] for message in messages()]
    results = [result for batch in batches for result in asyncio.run(generate_all(service.grpc, batch))]
    return [(result.text, result.reason) for result in results]


@pytest.mark.parametrize("topology", ["split", "combined"])
def test_the_text_is_that_of_the_plain_loop(topology: str, tmp_path: Path) -> None:
    split = topology == "split"
    spec = {
        "disaggregation": "Always" if split else "Never",
        "prefill": {"replicas": 1 if split else 0},
        "decode": {"replicas": 1, "kvCacheMemory": str(POOL_TOKENS * BYTES_PER_TOKEN)},
    }
    file = service_file(tmp_path / "spec", **spec)
    with running(tmp_path / "plain", file, env={"LANEWISE_RUN_AHEAD": "never"}) as service:
        expected = ask(service, together=False)
    assert {reason for _, reason in expected} == {"length", "stop"}
    with running(tmp_path / "ahead", file, env={"LANEWISE_RUN_AHEAD": "always"}) as service:
        # Admission predicts from recent outputs: after short ones it takes in more than the pool can hold to the end.
        asyncio.run(generate_all(service.grpc, [request("short", max_tokens=3, temperature=0.0)] * 24))
        for seed in range(2):
            asyncio.run(leave_some(service.grpc, seed))
            assert ask(service, together=True) == expected
        service.audit()
        assert "engine_thread_died" not in service.read_log()
