"""A stand-in for the API server's EndpointSlices, for what a real one cannot be made to do on demand.

It answers list and watch from one set of objects, and misbehaves as told: 410, a cut or silent watch, garbage, 401.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from lanewise.router.discovery import Discovery, View

PATH = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"


def slice_of(
    name: str, service: str, *endpoints: dict[str, Any], port: int = 50061, family: str = "IPv4"
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": "metrics", "port": 8080}, {"name": "grpc", "port": port}],
    }


def endpoint(address: str, uid: str = "", **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions, "targetRef": {"kind": "Pod", "uid": uid or address}}


class StandInApi:
    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.version = 100
        self.token = ""  # what a client must present; empty: nothing
        self.lists: list[int] = []  # the version that each list answered
        self.watches: list[int] = []  # the version that each watch began at
        self.refuse = 0  # status for everything
        self.on_watch: list[Any] = []  # bytes to write, then the watch is cut; one entry per watch to come
        self._log: list[tuple[int, str, dict[str, Any]]] = []
        self._wake: set[asyncio.Event] = set()
        self._runner: web.AppRunner | None = None
        self._end_watches = False
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> StandInApi:
        app = web.Application()
        app.router.add_get(PATH, self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    # ------------------------------------------------------------ what a test does

    def put(self, thing: dict[str, Any]) -> None:
        name = thing["metadata"]["name"]
        self._change("MODIFIED" if name in self.objects else "ADDED", thing)
        self.objects[name] = thing

    def delete(self, name: str) -> None:
        self._change("DELETED", self.objects.pop(name))

    def bookmark(self) -> None:
        self.version += 50
        self._note("BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}})

    def expire(self) -> None:
        """As after a compaction: open watches are told, and no old version can be watched from."""
        self._note("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})

    def end_watches(self) -> None:
        """As when timeoutSeconds is over."""
        self._end_watches = True
        self._signal()

    # ------------------------------------------------------------ the server

    def _change(self, kind: str, thing: dict[str, Any]) -> None:
        self.version += 1
        thing["metadata"]["resourceVersion"] = str(self.version)
        self._note(kind, json.loads(json.dumps(thing)))

    def _note(self, kind: str, thing: dict[str, Any]) -> None:
        self._log.append((self.version, kind, thing))
        self._signal()

    def _signal(self) -> None:
        for event in self._wake:
            event.set()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"kind": "Status", "code": 401, "reason": "Unauthorized"}, status=401)
        if self.refuse:
            return web.json_response({"kind": "Status", "code": self.refuse, "reason": "No"}, status=self.refuse)
        service = request.query["labelSelector"].removeprefix("kubernetes.io/service-name=")
        if "watch" in request.query:
            assert request.query["allowWatchBookmarks"] == "true"
            return await self._watch(request, service, int(request.query["resourceVersion"]))
        self.lists.append(self.version)
        items = [thing for thing in self.objects.values() if _belongs(thing, service)]
        return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": items})

    async def _watch(self, request: web.Request, service: str, version: int) -> web.StreamResponse:
        self.watches.append(version)
        self._end_watches = False
        response = web.StreamResponse()
        await response.prepare(request)
        if self.on_watch:
            await response.write(self.on_watch.pop(0))
            assert request.transport is not None
            request.transport.close()
            return response
        wake = asyncio.Event()
        self._wake.add(wake)
        sent = next((i for i, (at, _, _) in enumerate(self._log) if at > version), len(self._log))
        try:
            while not self._end_watches:
                for _, kind, thing in self._log[sent:]:
                    if kind in ("BOOKMARK", "ERROR") or _belongs(thing, service):
                        line = json.dumps({"type": kind, "object": thing}).encode() + b"\n"
                        await response.write(line)
                sent = len(self._log)
                wake.clear()
                await wake.wait()
        finally:
            self._wake.discard(wake)
        return response


def _belongs(thing: dict[str, Any], service: str) -> bool:
    return bool(thing["metadata"].get("labels", {}).get("kubernetes.io/service-name") == service)


class Watched:
    """Follows a discovery as the roster does."""

    def __init__(self) -> None:
        self.views: list[View] = []

    @property
    def view(self) -> View:
        return self.views[-1]


@contextlib.asynccontextmanager
async def followed(discovery: Discovery) -> AsyncIterator[Watched]:
    watched = Watched()

    async def follow() -> None:
        async for view in discovery.watch():
            watched.views.append(view)

    task = asyncio.create_task(follow())
    try:
        yield watched
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
