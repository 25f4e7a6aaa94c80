"""A service with `transfer.channel: IPC`: the decode worker reads its KV from the prefill worker's memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lanewise.transfer import neighbour
from tests.e2e.service import generate_all, request, running, service_file, until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not neighbour.place(), reason="no process_vm_readv"),
]


def test_the_decode_worker_reads_the_prefill_workers_memory(tmp_path: Path) -> None:
    file = service_file(tmp_path / "spec", disaggregation="Always", transfer={"channel": "IPC"})
    with running(tmp_path / "state", file) as service:

        def counters(role: str) -> dict[str, int]:
            return dict(next(w.stats.counters for w in service.snapshot().workers if w.description.role == role))

        def links() -> list[str]:
            return [link.state for worker in service.snapshot().workers for link in worker.stats.links]

        until(lambda: links() == ["verified"], 20, lambda: f"links are {links()}")  # until then prefill is local
        texts: dict[int, list[int]] = {}

        def answer(first: int) -> list[int]:
            message = request(list(range(first, first + 400)), max_tokens=8, ignore_eos=True, temperature=0.0)
            [result] = asyncio.run(generate_all(service.grpc, [message]))
            assert result.reason == "length"
            return result.token_ids

        def referred() -> bool:
            """One more prompt: the first ones may be sent before the direct connection is tested."""
            first = 100 + 20 * len(texts)
            texts[first] = answer(first)
            return counters("prefill")["chunks_referred"] > 0

        until(referred, 30, lambda: f"prefill: {counters('prefill')}")
        assert counters("prefill")["chunks_resent"] == 0
        assert [answer(first) for first in texts] == list(texts.values())
        service.audit()
