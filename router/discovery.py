"""Where the workers are: a source of address sets, level-triggered.

Owns: the interface that every source of addresses has, and the static list.
Must not: connect to anything. An address is only a place to look; who is there is learned from `Describe`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from lanewise.config import RouterConfig


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the source says of one address. A router connects to all of them and gives new work to the ready ones."""

    ready: bool = True
    terminating: bool = False


View = Mapping[str, Endpoint]
"""host:port -> its endpoint; always complete."""


@dataclass(slots=True)
class Freshness:
    """How good the view is, for metrics and for `Fleet/Snapshot`."""

    kind: str
    synced: bool = False  # complete at least once
    error: str = ""  # why it is stale; empty while it is fresh
    stale_since: float | None = None  # on the monotonic clock

    def stale_s(self, now: float) -> float:
        return 0.0 if self.stale_since is None else now - self.stale_since


class Discovery(Protocol):
    @property
    def freshness(self) -> Freshness: ...

    def watch(self) -> AsyncIterator[View]:
        """Yields the complete view whenever it changes; never ends and never raises by itself."""
        ...


class StaticDiscovery:
    """The addresses of `RouterConfig.workers`."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self._addresses = {address: Endpoint() for address in addresses}
        self.freshness = Freshness("static", synced=True)

    async def watch(self) -> AsyncIterator[View]:
        yield self._addresses
        await asyncio.get_running_loop().create_future()  # until the owner cancels


def worker_discovery(config: RouterConfig) -> Discovery:
    """The source that the configuration names. Raises ConfigError."""
    if config.discovery == "static":
        return StaticDiscovery(config.workers)
    return _kubernetes(config, config.worker_services)


def peer_discovery(config: RouterConfig) -> Discovery:
    """All routers of the service, this one among them. Raises ConfigError."""
    if not config.peer_routers:
        return StaticDiscovery(config.peers)
    return _kubernetes(config, (config.peer_routers,))


def _kubernetes(config: RouterConfig, services: tuple[str, ...]) -> Discovery:
    # Only here: an HTTP client is a good part of a router's memory.
    from lanewise.router.discovery_kubernetes import KubernetesDiscovery

    return KubernetesDiscovery(services, api=config.kubernetes_api, account_dir=config.kubernetes_account_dir)
