"""A KV pool of 1.2 requests: preemption, recomputation, and no change of text."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from tests.e2e.service import generate_all, request, running, service_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
PROMPT, OUTPUT = 100, 240
BYTES_PER_TOKEN = 5120  # fable in fp32: 5 layers, K and V, 2 heads of 64
POOL = int(1.2 * (PROMPT + OUTPUT) * BYTES_PER_TOKEN)


@pytest.mark.parametrize("topology", ["split", "combined"])
def test_a_pool_of_one_and_a_fifth_requests_serves_four(topology: str, tmp_path: Path) -> None:
    messages = [
        request(
            [(7 * index + position) % 3000 + 50 for position in range(PROMPT)],
            max_tokens=OUTPUT,
            temperature=0.8,
            seed=index,
            ignore_eos=True,
        )
        for index in range(4)
    ]
    split = topology == "split"
    spec = {
        "disaggregation": "Always" if split else "Never",
        "prefill": {"replicas": 1 if split else 0},
        "decode": {"replicas": 1},
    }
    with running(tmp_path / "large", service_file(tmp_path / "a", **spec)) as service:
        expected = [asyncio.run(generate_all(service.grpc, [message]))[0].text for message in messages]
    spec["decode"] = {"replicas": 1, "kvCacheMemory": str(POOL)}
    with running(tmp_path / "small", service_file(tmp_path / "b", **spec)) as service:
        # Admission predicts from recent outputs: after short ones it takes in more than the pool can hold to the end.
        asyncio.run(generate_all(service.grpc, [request("short", max_tokens=4, temperature=0.0)] * 24))
        results = asyncio.run(generate_all(service.grpc, messages))
        assert [result.reason for result in results] == ["length"] * 4
        assert [result.text for result in results] == expected
        service.audit()
        preempted = service.metric("lanewise_worker_preemptions", role="decode")
        # A request that can never fit is refused by name, not queued for ever.
        with pytest.raises(ExceptionGroup) as raised:
            asyncio.run(generate_all(service.grpc, [request("x", max_tokens=1500, temperature=0.0)]))
        assert re.search(r"limit is \d{3} tokens", str(raised.value.exceptions[0])), "the limit is named"
    assert preempted >= 1, "the pool was never short, so this test shows nothing"
