"""A service whose workers talk encrypted: it serves, KV moves between them, and nobody else may ask a worker."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import pytest

from lanewise.cli import main
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.e2e.service import generate_all, request, running, service_file, until

pytestmark = pytest.mark.e2e


def test_a_service_with_keys_serves_and_refuses_strangers(tmp_path: Path) -> None:
    assert main(["keys", "make", str(tmp_path / "secret")]) == 0
    file = service_file(
        tmp_path / "spec",
        disaggregation="Always",
        transfer={"encryption": "Authenticated", "secretRef": {"name": "keys"}},
    )
    env = {"LANEWISE_SECRET_DIR": str(tmp_path / "secret")}
    with running(tmp_path / "state", file, env=env) as service:

        def links() -> list[str]:
            return [link.state for worker in service.snapshot().workers for link in worker.stats.links]

        until(lambda: links() == ["verified"], 20, lambda: f"links are {links()}")  # until then prefill is local
        message = request("Once upon a time there was a fox " * 10, max_tokens=8, ignore_eos=True, temperature=0.0)
        results = asyncio.run(generate_all(service.grpc, [message] * 4))
        assert [result.reason for result in results] == ["length"] * 4

        def count(name: str) -> int:
            return sum(worker.stats.counters[name] for worker in service.snapshot().workers)

        # Statistics are a moment older than the answers.
        until(lambda: count("committed") >= 1, 5, lambda: "no transfer was committed")
        assert count("bytes_received") > 0
        assert count("forged") == 0
        address = service.process_of("decode")["address"]
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
            pb_grpc.WorkerStub(channel).Describe(pb.DescribeRequest(), timeout=3)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        service.audit()


def test_keys_are_made_once_and_rotated_in_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "secret"

    def step(name: str) -> int:
        return main(["keys", name, str(secret)])

    assert step("rotate") == 2
    assert step("make") == 0
    assert step("make") == 1
    first = (secret / "kv-client.public").read_bytes()
    assert step("rotate") == 2
    assert step("next") == 0
    assert step("next") == 1
    second = (secret / "kv-client-next.public").read_bytes()
    assert step("rotate") == 0
    assert (secret / "kv-client.public").read_bytes() == second
    assert (secret / "kv-client-previous.public").read_bytes() == first
    assert step("retire") == 0
    assert not (secret / "kv-client-previous.public").exists()
    assert not any(os.stat(path).st_mode & 0o077 for path in secret.iterdir())
    out = capsys.readouterr()
    for path in secret.glob("*.secret"):
        assert path.read_text() not in out.out + out.err
