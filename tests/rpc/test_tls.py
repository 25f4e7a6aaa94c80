"""Mutual TLS of Worker gRPC on real sockets, and the health port beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lanewise.config import WorkerConfig
from lanewise.errors import ConfigError
from lanewise.local.keys import make_keys
from lanewise.local.machine import free_ports
from lanewise.rpc.process import _serve_probes
from lanewise.rpc.tls import open_channel, server_credentials

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def keys(tmp_path: Path) -> str:
    make_keys(tmp_path / "secret")
    return str(tmp_path / "secret")


@pytest.fixture
async def worker(keys: str) -> AsyncIterator[str]:
    """Any service will do: the address of one that asks for a certificate."""
    server = grpc.aio.server()
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(keys))
    await server.start()
    await checks.set("", SERVING)
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def ask(channel: grpc.aio.Channel) -> int:
    async with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return int(reply.status)


async def test_both_ends_with_certificates_of_one_authority_talk(worker: str, keys: str) -> None:
    assert await ask(open_channel(worker, keys)) == SERVING


async def test_no_certificate_or_one_of_another_service_is_refused(worker: str, keys: str, tmp_path: Path) -> None:
    make_keys(tmp_path / "other")
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(open_channel(worker, ""))
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(open_channel(worker, str(tmp_path / "other")))
    # Trusts the right authority, but shows nothing or the certificate of another.
    authority = (Path(keys) / "ca.crt").read_bytes()
    named = (("grpc.ssl_target_name_override", "lanewise-worker"),)
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(grpc.aio.secure_channel(worker, grpc.ssl_channel_credentials(authority), options=named))
    (tmp_path / "other" / "ca.crt").write_bytes(authority)
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(open_channel(worker, str(tmp_path / "other")))


async def test_a_router_does_not_talk_to_a_worker_of_another_service(tmp_path: Path, worker: str) -> None:
    make_keys(tmp_path / "mine")
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(open_channel(worker, str(tmp_path / "mine")))


async def test_health_checks_need_no_certificate_where_they_have_a_port_of_their_own() -> None:
    address = f"127.0.0.1:{next(free_ports())}"
    checks = health.aio.HealthServicer()
    await checks.set("", SERVING)
    server = await _serve_probes(WorkerConfig(health_listen=address), checks)
    assert await ask(grpc.aio.insecure_channel(address)) == SERVING
    await server.stop(None)
    with pytest.raises(ConfigError, match="cannot listen on"):
        await _serve_probes(WorkerConfig(health_listen="203.0.113.1:1"), checks)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.crt"):
        server_credentials(str(tmp_path))
    with pytest.raises(ConfigError, match=r"ca\.crt"):
        open_channel("127.0.0.1:1", str(tmp_path))
