"""The one method that writes: fenced before the request is on the wire, finished once begun, errors in our words."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from lanewise.config import OperatorConfig
from lanewise.operator.cluster import ApiError, Cluster, Fenced, Gone, Unavailable, path_of
from lanewise.telemetry import Metrics

SERVICE = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x", "namespace": "n"}, "spec": {}}


class Api:
    """Answers every request with `status` and `body`, after `delay_s`; remembers what came."""

    def __init__(self) -> None:
        self.status, self.body, self.delay_s = 200, dict[str, Any](), 0.0
        self.seen: list[tuple[str, str, str]] = []
        self.answered = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.seen.append((request.method, request.path_qs, request.headers.get("Content-Type", "")))
        await request.read()
        await asyncio.sleep(self.delay_s)
        self.answered += 1
        return web.json_response(self.body, status=self.status)


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[tuple[Api, Cluster]]:
    api, app = Api(), web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, handler_cancellation=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": f"http://{host}:{port}"}}],
        "users": [{"name": "x", "user": {"token": "t"}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    cluster = Cluster(OperatorConfig(kubeconfig=str(tmp_path / "config")), Metrics())
    await cluster.open()
    cluster.fence.deadline = time.monotonic() + 60
    try:
        yield api, cluster
    finally:
        await cluster.close()
        await runner.cleanup()


async def test_apply_is_server_side_forced_and_strict(tmp_path: Path) -> None:
    async with running(tmp_path) as (api, cluster):
        api.body = {"kind": "Service", "metadata": {"name": "x"}}
        assert await cluster.apply(SERVICE) == api.body
    ((method, path, content_type),) = api.seen
    assert method == "PATCH"
    assert path == ("/api/v1/namespaces/n/services/x?fieldManager=lanewise-operator&force=true&fieldValidation=Strict")
    assert content_type == "application/apply-patch+yaml"


async def test_nothing_is_written_without_the_lease_and_everything_can_be_read(tmp_path: Path) -> None:
    async with running(tmp_path) as (api, cluster):
        cluster.fence.deadline = time.monotonic()
        for write in (cluster.apply(SERVICE), cluster.create(SERVICE), cluster.delete("Service", "n", "x", "u")):
            with pytest.raises(Fenced):
                await write
        assert api.seen == []
        assert await cluster.list("Service", "n") == []
        assert [method for method, _, _ in api.seen] == ["GET"]


async def test_the_fence_is_asked_again_when_the_connection_is_at_hand(tmp_path: Path) -> None:
    """A process that is stopped between the first question and the wire must not write when it goes on."""
    async with running(tmp_path) as (api, cluster):
        questions = 0

        def clock() -> float:
            nonlocal questions
            questions += 1
            return 0.0 if questions == 1 else 1000.0

        cluster.fence.clock, cluster.fence.deadline = clock, 500.0
        with pytest.raises(Fenced):
            await cluster.apply(SERVICE)
        assert (questions, api.seen) == (2, [])


async def test_a_write_that_has_begun_is_finished_before_the_lease_goes(tmp_path: Path) -> None:
    async with running(tmp_path) as (api, cluster):
        api.delay_s = 0.5
        task = asyncio.create_task(cluster.apply(SERVICE))
        async with asyncio.timeout(10):
            while not api.seen:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert api.answered == 0
        await cluster.quiet()
        assert api.answered == 1


@pytest.mark.parametrize(
    ("status", "body", "error", "refused"),
    [
        (403, {"reason": "Forbidden", "message": "exceeded quota"}, ApiError, True),
        (422, {"reason": "Invalid", "message": "no"}, ApiError, True),
        (409, {"reason": "Conflict", "message": "modified"}, ApiError, False),
        (404, {"reason": "NotFound", "message": "none"}, Gone, False),
        (500, {"message": "failed to create typed patch object (x): .spec.y: field not declared"}, ApiError, True),
        (500, {"message": "etcd is slow"}, Unavailable, None),
        (429, {"message": "too many"}, Unavailable, None),
    ],
)
async def test_errors(
    tmp_path: Path, status: int, body: dict[str, Any], error: type[Exception], refused: bool | None
) -> None:
    async with running(tmp_path) as (api, cluster):
        api.status, api.body = status, body
        with pytest.raises(error, match=body["message"][:10]) as raised:
            await cluster.apply(SERVICE)
    if isinstance(raised.value, ApiError):
        assert raised.value.refused is refused


async def test_what_is_gone_already_is_deleted(tmp_path: Path) -> None:
    async with running(tmp_path) as (api, cluster):
        api.status, api.body = 404, {"reason": "NotFound", "message": "none"}
        await cluster.delete("Service", "n", "x", "u")
        assert await cluster.get("Service", "n", "x") is None


async def test_an_api_server_that_is_away(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, cluster):
        pass
    await cluster.open()
    cluster.fence.deadline = time.monotonic() + 60
    try:
        with pytest.raises(Unavailable):
            await cluster.apply(SERVICE)
    finally:
        await cluster.close()


def test_paths() -> None:
    assert path_of("Deployment", "n", "x", "scale") == "/apis/apps/v1/namespaces/n/deployments/x/scale"
    assert path_of("Lease", None) == "/apis/coordination.k8s.io/v1/leases"
