"""A service whose KV travels encoded: it serves, fewer bytes move, and workers of another encoding are strangers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.service import generate_all, request, running, service_file, until

pytestmark = pytest.mark.e2e


def test_a_service_serves_with_int8_on_the_wire(tmp_path: Path) -> None:
    file = service_file(tmp_path / "spec", disaggregation="Always", transfer={"encoding": "Int8"})
    with running(tmp_path / "state", file) as service:

        def links() -> list[str]:
            return [link.state for worker in service.snapshot().workers for link in worker.stats.links]

        until(lambda: links() == ["verified"], 20, lambda: f"links are {links()}")  # until then prefill is local
        single = request(list(range(500, 700)), max_tokens=1, ignore_eos=True, temperature=0.0)
        [alone] = asyncio.run(generate_all(service.grpc, [single]))
        assert (alone.reason, len(alone.token_ids)) == ("length", 1)  # its KV goes nowhere, see below
        message = request(list(range(300, 500)), max_tokens=8, ignore_eos=True, temperature=0.0)
        [result] = asyncio.run(generate_all(service.grpc, [message]))
        assert result.reason == "length"
        workers = service.snapshot().workers
        assert [dict(worker.description.fingerprint_fields)["kv_encoding"] for worker in workers] == ["Int8"] * 2
        native = 200 * workers[0].description.kv_bytes_per_token

        def received() -> int:
            return sum(worker.stats.counters["bytes_received"] for worker in service.snapshot().workers)

        until(lambda: received() > 0, 20, lambda: "nothing was transferred")
        assert 0.25 * native < received() < 0.35 * native  # int8 of float32, and scales
        service.audit()
