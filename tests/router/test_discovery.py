"""Discovery by EndpointSlices: what the conditions mean, and going on after whatever the API server does.

A real API server is met in tests/cluster; here stands one that fails on demand.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lanewise.errors import ConfigError
from lanewise.router import discovery_kubernetes, http_server
from lanewise.router.discovery import Endpoint
from lanewise.router.discovery_kubernetes import KubernetesDiscovery
from lanewise.router.endpoint_slices import fold
from tests.router.scripted import ScriptedWorker, partly, rig, story, until
from tests.router.stand_in_api import StandInApi, Watched, endpoint, followed, slice_of

SERVICES = ("shop/chat-prefill", "shop/chat-decode")
READY = Endpoint()


class TestFold:
    def test_conditions(self) -> None:
        slices = [
            slice_of(
                "s",
                "x",
                endpoint("10.0.0.1", ready=True, serving=True, terminating=False),
                endpoint("10.0.0.2", ready=False),
                endpoint("10.0.0.3", ready=False, serving=True, terminating=True),
                endpoint("10.0.0.4"),  # nothing said means ready
            )
        ]
        assert fold(slices) == {
            "10.0.0.1:50061": READY,
            "10.0.0.2:50061": Endpoint(ready=False),
            "10.0.0.3:50061": Endpoint(ready=False, terminating=True),
            "10.0.0.4:50061": READY,
        }

    def test_one_pod_in_two_slices_is_one_worker(self) -> None:
        old = slice_of("a", "x", endpoint("10.0.0.1", ready=False))
        new = slice_of("b", "x", endpoint("10.0.0.1", ready=True))
        assert fold([old, new]) == fold([new, old]) == {"10.0.0.1:50061": READY}
        six = slice_of("c", "x", endpoint("fd00::1", uid="pod"), family="IPv6")
        four = slice_of("d", "x", endpoint("10.0.0.9", uid="pod"))
        assert fold([six, four]) == {"10.0.0.9:50061": READY}
        assert fold([six]) == {"[fd00::1]:50061": READY}

    def test_what_has_no_port_or_address_is_left_out(self) -> None:
        other = slice_of("s", "x", endpoint("10.0.0.1"))
        other["ports"] = [{"name": "http", "port": 80}]
        empty = slice_of("t", "x", {"addresses": [], "conditions": {}})
        null = {"metadata": {"name": "n"}, "addressType": "IPv4", "endpoints": None, "ports": None}
        assert fold([other, empty, null]) == {}


@pytest.fixture
async def api() -> AsyncIterator[StandInApi]:
    served = await StandInApi().start()
    served.put(slice_of("p", "chat-prefill", endpoint("10.0.0.1")))
    served.put(slice_of("d", "chat-decode", endpoint("10.0.0.2", ready=False)))
    served.put(slice_of("other", "chat-router", endpoint("10.0.0.7")))
    yield served
    await served.stop()


def discovery(api: StandInApi, account: Path) -> KubernetesDiscovery:
    return KubernetesDiscovery(SERVICES, api=api.url, account_dir=str(account))


def ready(watched: Watched) -> set[str]:
    return {address for address, seen in watched.view.items() if seen.ready} if watched.views else set()


class TestWatch:
    async def test_the_first_view_is_complete_and_changes_follow(self, api: StandInApi, tmp_path: Path) -> None:
        async with followed(discovery(api, tmp_path)) as watched:
            await until(lambda: watched.views)
            assert watched.views == [{"10.0.0.1:50061": READY, "10.0.0.2:50061": Endpoint(ready=False)}]
            api.put(slice_of("d", "chat-decode", endpoint("10.0.0.2"), endpoint("10.0.0.3")))
            await until(lambda: ready(watched) == {"10.0.0.1:50061", "10.0.0.2:50061", "10.0.0.3:50061"})
            api.delete("p")
            await until(lambda: ready(watched) == {"10.0.0.2:50061", "10.0.0.3:50061"})
            assert len(api.lists) == 2

    async def test_while_the_api_server_is_away_the_last_view_stands(self, api: StandInApi, tmp_path: Path) -> None:
        source = discovery(api, tmp_path)
        async with followed(source) as watched:
            await until(lambda: watched.views)
            assert source.freshness.stale_since is None
            await api.stop()
            await until(lambda: source.freshness.error)
            assert source.freshness.stale_since is not None
            assert len(watched.views) == 1
            api.put(slice_of("d", "chat-decode", endpoint("10.0.0.2")))
            await api.start()
            await until(lambda: ready(watched) == {"10.0.0.1:50061", "10.0.0.2:50061"})
            await until(lambda: not source.freshness.error)

    async def test_an_expired_version_is_listed_anew(self, api: StandInApi, tmp_path: Path) -> None:
        async with followed(discovery(api, tmp_path)) as watched:
            await until(lambda: len(api.watches) == 2)
            api.expire()
            api.put(slice_of("d", "chat-decode", endpoint("10.0.0.5")))
            await until(lambda: "10.0.0.5:50061" in ready(watched))
            await until(lambda: len(api.lists) == 4)

    async def test_a_watch_that_the_server_ends_goes_on_from_the_bookmark(
        self, api: StandInApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(discovery_kubernetes, "SHORTEST_WATCH_S", 0.0)
        async with followed(discovery(api, tmp_path)) as watched:
            await until(lambda: len(api.watches) == 2)
            api.bookmark()
            await asyncio.sleep(0.05)
            api.end_watches()
            await until(lambda: len(api.watches) == 4)
            assert api.watches[2:] == [api.version] * 2
            api.put(slice_of("d", "chat-decode", endpoint("10.0.0.6")))
            await until(lambda: "10.0.0.6:50061" in ready(watched))
            assert len(api.lists) == 2

    @pytest.mark.parametrize(
        "said",
        [
            b'{"type": "MODIFIED", "object": {"metadata": {"name": "p"',
            b"<html>502 Bad Gateway</html>\n",
            b'["no", "event"]\n',
            b'{"type": "MODIFIED", "object": {"metadata": {"name": "p"}}}\n',
            b'{"type": "ADDED", "object": {"metadata": {"resourceVersion": "7"}, "endpoints": 7}}\n',
            b'{"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "etcd is tired"}}\n',
            b"",
        ],
    )
    async def test_nonsense_and_cut_watches_change_nothing(self, api: StandInApi, tmp_path: Path, said: bytes) -> None:
        api.on_watch = [said] * 4
        async with followed(discovery(api, tmp_path)) as watched:
            await until(lambda: len(api.watches) >= 6)
            assert watched.views == [{"10.0.0.1:50061": READY, "10.0.0.2:50061": Endpoint(ready=False)}]
            api.put(slice_of("d", "chat-decode", endpoint("10.0.0.2")))
            await until(lambda: "10.0.0.2:50061" in ready(watched))

    async def test_the_token_is_read_again(self, api: StandInApi, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("first\n")
        api.token = "first"
        source = discovery(api, tmp_path)
        async with followed(source) as watched:
            await until(lambda: watched.views)
            api.token = "second"
            api.expire()
            await until(lambda: "401" in source.freshness.error)
            (tmp_path / "token").write_text("second")
            api.put(slice_of("d", "chat-decode", endpoint("10.0.0.2")))
            await until(lambda: "10.0.0.2:50061" in ready(watched))

    async def test_a_refusing_server_is_not_hammered(self, api: StandInApi, tmp_path: Path) -> None:
        api.refuse = 503
        source = discovery(api, tmp_path)
        async with followed(source) as watched:
            await until(lambda: source.freshness.error)
            assert "503" in source.freshness.error
            assert not source.freshness.synced
            api.refuse = 0
            await until(lambda: watched.views)

    def test_bad_configuration_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        with pytest.raises(ConfigError, match="namespace/name"):
            KubernetesDiscovery(("chat",), api="http://x", account_dir="")
        with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST"):
            KubernetesDiscovery(SERVICES, api="", account_dir="")
        with pytest.raises(ConfigError, match="worker_services"):
            KubernetesDiscovery((), api="http://x", account_dir="")


class TestRouter:
    """A whole router that learns of scripted workers from the stand-in."""

    async def _serve(self, api: StandInApi, worker: ScriptedWorker, **conditions: bool) -> None:
        host, _, port = worker.address.rpartition(":")
        api.put(slice_of(worker.role, f"chat-{worker.role}", endpoint(host, worker.name, **conditions), port=int(port)))

    async def test_unready_is_connected_ready_is_routed_terminating_finishes(self, tmp_path: Path) -> None:
        api = await StandInApi().start()
        worker = await ScriptedWorker("decode").start()
        settings = {"discovery": "kubernetes", "worker_services": SERVICES, "kubernetes_api": api.url}
        try:
            await self._serve(api, worker, ready=False)
            async with rig("", workers=(), kubernetes_account_dir=str(tmp_path), **settings) as made:
                await until(lambda: made.router.roster.sessions())
                (session,) = made.router.roster.sessions()
                assert session.not_ready == "its pod is not ready"
                assert not made.router.dispatcher.routable
                answer = asyncio.create_task(made.text(40))
                await until(lambda: made.router.dispatcher.num_held == 1)
                worker.on_submit = partly(worker, 20, lambda _: None)
                await self._serve(api, worker, ready=True)
                await until(lambda: made.router.dispatcher.routable)
                await until(lambda: worker.submits)
                await self._serve(api, worker, ready=False, serving=True, terminating=True)
                await until(lambda: session.not_ready == "its pod is terminating")
                held = asyncio.create_task(made.text())
                await until(lambda: made.router.dispatcher.num_held == 1)
                api.delete("decode")  # the slice forgets the pod before its last stream is over
                await until(lambda: not made.router.roster.endpoints)
                worker.tokens(worker.submits[0], 20, 40)
                assert await answer == story(40)
                assert len(worker.submits) == 1
                held.cancel()
        finally:
            await worker.stop()
            await api.stop()

    @pytest.fixture
    def brief(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_server, "FIRST_KEEP_ALIVE_S", 0.02)
        monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.02)

    async def test_scaled_to_zero_a_restarted_router_is_ready_and_holds(self, tmp_path: Path, brief: None) -> None:
        api = await StandInApi().start()
        worker = await ScriptedWorker("decode").start()
        settings = {"discovery": "kubernetes", "worker_services": SERVICES, "kubernetes_api": api.url}
        try:
            async with rig("", workers=(), served_name="fable", **settings) as made:
                await until(lambda: made.router.dispatcher.routable)
                async with made.http.get(made.url + "/readyz") as reply:
                    assert reply.status == 200
                status, reply_body, _ = await made.post(model="other")
                assert (status, reply_body["error"]["code"]) == (404, "MODEL_NOT_FOUND")
                async with made.http.get(made.url + "/v1/models") as reply:
                    assert [model["id"] for model in (await reply.json())["data"]] == ["fable"]
                answer = asyncio.create_task(made.text())
                body = {"model": "fable", "prompt": "Once", "stream": True, "max_tokens": 12}
                async with made.http.post(made.url + "/v1/completions", json=body) as stream:
                    assert await stream.content.readline() == b": keep-alive\n"
                    await until(lambda: made.router.front.num_early == 2)
                    await self._serve(api, worker)
                    lines = [line async for line in stream.content if line.startswith(b"data: ")]
                assert lines[-1] == b"data: [DONE]\n"
                chunks = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
                assert "".join(chunks) == await answer == story(12)
        finally:
            await worker.stop()
            await api.stop()

    async def test_a_stream_held_at_zero_workers_ends_with_a_typed_error(self, tmp_path: Path, brief: None) -> None:
        api = await StandInApi().start()
        settings = {"discovery": "kubernetes", "worker_services": SERVICES, "kubernetes_api": api.url}
        async with rig("", workers=(), hold_timeout_s=0.2, **settings) as made:
            body = {"model": "fable", "prompt": "Once", "stream": True}
            async with made.http.post(made.url + "/v1/completions", json=body) as stream:
                assert stream.status == 200
                lines = [line async for line in stream.content if line.startswith(b"data: ")]
            assert json.loads(lines[-1][6:])["error"]["code"] == "NO_WORKERS"
        await api.stop()

    async def test_an_api_server_that_is_away_does_not_look_like_zero_workers(self, tmp_path: Path) -> None:
        api = await StandInApi().start()
        url = api.url
        await api.stop()
        settings = {"discovery": "kubernetes", "worker_services": SERVICES, "kubernetes_api": url}
        async with rig("", workers=(), **settings) as made:
            await until(lambda: made.router.discovery.freshness.error)
            async with made.http.get(made.url + "/readyz") as reply:
                assert reply.status == 503
            assert b"lanewise_discovery_synced 0.0" in made.router.metrics.render()
