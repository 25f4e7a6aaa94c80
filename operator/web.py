"""The operator's HTTP side: /healthz, /readyz, /metrics.

Owns: the three pages. Must not: serve anything of a service. A standby is ready too, or an upgrade would wait for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from lanewise.errors import ConfigError

QUIET_S = 15.0


class Web:
    """`last_answer()` is the monotonic time at which the API server last answered."""

    def __init__(self, address: str, registry: CollectorRegistry, last_answer: Callable[[], float]) -> None:
        self._address, self._registry, self._last_answer = address, registry, last_answer
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        host, _, port = self._address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"http: expected host:port, got {self._address!r}")
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port)).start()
        except OSError as error:
            raise ConfigError(f"http: cannot listen on {self._address}: {error}") from error

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # this loop turns

    async def _readyz(self, _: web.Request) -> web.Response:
        quiet = time.monotonic() - self._last_answer()
        if quiet > QUIET_S:
            return web.Response(status=503, text=f"the Kubernetes API has not answered for {quiet:.0f} s\n")
        return web.Response(text="ok\n")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4"})
