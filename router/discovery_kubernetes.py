"""Workers by the EndpointSlices of their Services: list, then watch, for ever.

Owns: the last view of every Service, and going on after whatever the API server does. While it is away, the last view
stands: an address is only taken away by the API server's own word.
Must not: raise (the router would stop serving for it), or write to the API.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import structlog

from lanewise.errors import ConfigError
from lanewise.router.discovery import Endpoint, Freshness, View
from lanewise.router.endpoint_slices import fold
from lanewise.router.kubernetes_api import OPENED, ApiFailed, Expired, KubernetesApi

SERVICE_LABEL = "kubernetes.io/service-name"
FIRST_BACKOFF_S = 0.2
LAST_BACKOFF_S = 10.0
SHORTEST_WATCH_S = 1.0  # one that the server ends sooner counts as a failure, lest it be opened without pause
HEALTHY_S = 5.0  # a watch that lived this long starts the back-off anew
GRACE_S = 1.0  # a watch that broke is no news while the next one opens within this time

log = structlog.get_logger(__name__)


class _Service:
    """The slices of one Service, as last heard."""

    def __init__(self, reference: str) -> None:
        namespace, _, name = reference.partition("/")
        if not namespace or not name or "/" in name:
            raise ConfigError(f"worker_services: expected namespace/name, got {reference!r}")
        self.reference = reference
        self.path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self.selector = f"{SERVICE_LABEL}={name}"
        self.slices: dict[str, dict[str, Any]] = {}
        self.version = ""  # to watch from; empty: list first
        self.listed = False
        self.failures = 0
        self.opened_at: float | None = None  # the watch that is open, or was last
        self.broken_at: float | None = None
        self.error = ""


class KubernetesDiscovery:
    def __init__(self, services: tuple[str, ...], *, api: str, account_dir: str) -> None:
        if not services:
            raise ConfigError("discovery: kubernetes needs worker_services")
        self._services = [_Service(reference) for reference in services]
        self._api = KubernetesApi(api, account_dir)
        self._changed = asyncio.Event()
        self._freshness = Freshness("kubernetes")

    @property
    def freshness(self) -> Freshness:
        """As of now: stale once a Service could not be watched for GRACE_S."""
        fresh, now = self._freshness, time.monotonic()
        broken = [s for s in self._services if s.broken_at is not None and now - s.broken_at > GRACE_S]
        fresh.stale_since = min((s.broken_at for s in broken if s.broken_at is not None), default=None)
        fresh.error = "; ".join(f"{s.reference}: {s.error}" for s in broken)
        return fresh

    async def watch(self) -> AsyncIterator[View]:
        """The first view comes when every Service has been listed."""
        async with self._api:
            tasks = [asyncio.create_task(self._follow(service)) for service in self._services]
            try:
                last: dict[str, Endpoint] | None = None
                while True:
                    await self._changed.wait()
                    self._changed.clear()
                    if not all(service.listed for service in self._services):
                        continue
                    self._freshness.synced = True
                    view = fold(slice_ for service in self._services for slice_ in service.slices.values())
                    if view != last:
                        last = view
                        yield view
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, service: _Service) -> None:
        """Owned task."""
        while True:
            try:
                if not service.version:
                    await self._list(service)
                await self._watch(service)
            except Expired as error:
                log.info("watch_expired", service=service.reference, reason=str(error))
                await self._failed(service, str(error))
            except ApiFailed as error:
                await self._failed(service, str(error))
            except Exception as error:  # a defect of ours must not end the process: the view stands
                log.exception("discovery_defect", service=service.reference)
                await self._failed(service, f"defect: {error!r}")

    async def _list(self, service: _Service) -> None:
        items, version = await self._api.list(service.path, service.selector)
        service.slices = {_name(item): item for item in items}
        service.version, service.listed = version, True
        self._changed.set()

    async def _watch(self, service: _Service) -> None:
        """One watch, to its end. Ended by the server it is opened again at once, from where it was."""
        events = self._api.watch(service.path, service.selector, service.version)
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for kind, thing in events:
                if kind == OPENED:
                    self._opened(service)
                    continue
                version = str((thing.get("metadata") or {}).get("resourceVersion") or "")
                if not version:
                    raise ApiFailed(f"a {kind} event without a resourceVersion")
                if kind in ("ADDED", "MODIFIED"):
                    service.slices[_name(thing)] = thing
                elif kind == "DELETED":
                    service.slices.pop(_name(thing), None)
                service.version = version  # a BOOKMARK says only this
                self._changed.set()
        if _age(service.opened_at) < SHORTEST_WATCH_S:
            raise ApiFailed("the watch ended as soon as it was opened")

    def _opened(self, service: _Service) -> None:
        if service.failures > 1:
            log.info("discovery_fresh", service=service.reference, stale_s=round(_age(service.broken_at), 1))
        service.opened_at, service.broken_at, service.error = time.monotonic(), None, ""

    async def _failed(self, service: _Service, reason: str) -> None:
        """List again after a while: that loses nothing, whatever the reason was, and the answer is small."""
        if service.broken_at is None and service.opened_at is not None and _age(service.opened_at) > HEALTHY_S:
            service.failures = 0
        service.version = ""
        service.failures += 1
        service.error = reason
        if service.broken_at is None:
            service.broken_at = time.monotonic()
        if service.failures == 2:  # one cut watch is everyday
            log.warning("discovery_stale", service=service.reference, reason=reason, kept=len(service.slices))
        longest = min(FIRST_BACKOFF_S * 2.0 ** min(service.failures - 1, 10), LAST_BACKOFF_S)
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # many routers must not come back in step


def _age(since: float | None) -> float:
    return 0.0 if since is None else time.monotonic() - since


def _name(thing: dict[str, Any]) -> str:
    name = (thing.get("metadata") or {}).get("name")
    if not name:
        raise ApiFailed("an EndpointSlice without a name")
    return str(name)
