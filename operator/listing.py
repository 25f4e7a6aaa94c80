"""Reading one service and all its children from the API server.

Owns: which kinds are listed, and which optional APIs the cluster has. Must not: decide anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from lanewise.operator.cluster import Cluster
from lanewise.operator.kinds import CHILDREN, OPTIONAL
from lanewise.operator.names import SERVICE_LABEL
from lanewise.operator.observed import Key, Store

DISCOVERY_S = 600.0
PARALLEL = 4


class Lister:
    """Fills the store for one service at a time."""

    def __init__(self, cluster: Cluster, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster, self._store, self._clock = cluster, store, clock
        self._optional: frozenset[str] = frozenset()
        self._discovered: float | None = None
        self._discovering = asyncio.Lock()

    async def monitors(self) -> frozenset[str]:
        """Which optional kinds exist; asked again every 10 min, since they may be installed later."""
        async with self._discovering:
            if self._discovered is None or self._clock() - self._discovered > DISCOVERY_S:
                found = [kind for kind in OPTIONAL if await self._cluster.has_kind(kind)]
                self._optional, self._discovered = frozenset(found), self._clock()
        return self._optional

    async def refresh(self, key: Key) -> None:
        """Replaces what the store has of this service by what the API server has now."""
        namespace, name = key
        optional = await self.monitors()
        kinds = [kind for kind in CHILDREN if kind not in OPTIONAL or kind in optional]
        limit = asyncio.Semaphore(PARALLEL)

        async def one(kind: str, **query: str) -> list[dict[str, Any]]:
            async with limit:
                return await self._cluster.list(kind, namespace, **query)

        started = self._clock()
        services, *children = await asyncio.gather(
            one("LLMService", fieldSelector=f"metadata.name={name}"),
            *(one(kind, labelSelector=f"{SERVICE_LABEL}={name}") for kind in kinds),
        )
        found = [item for group in children for item in group]
        self._store.relisted(key, services[0] if services else None, found, started)
