"""Which namespaces this operator works in, and how two operators keep out of each other's way.

Owns: the marker Lease that a namespaced operator keeps in each of its namespaces, and a cluster-wide operator's view of
them: it leaves a namespace alone while somebody else's marker lives. Must not: elect anybody (leader.py does).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import structlog

from lanewise.operator.cluster import ApiError, Cluster, Unavailable

MARKER = "lanewise-namespace"
DURATION_S = 60
MARK_S = 20.0  # between two renewals of our markers
LOOK_S = 5.0  # between two looks at those of others: so long may two operators work in one namespace

log = structlog.get_logger(__name__)


class Scope:
    """`run()` keeps it true; `skips(namespace)` answers."""

    def __init__(
        self,
        cluster: Cluster,
        namespaces: tuple[str, ...],
        identity: str,
        on_change: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._namespaces, self._identity = cluster, namespaces, identity
        self._on_change, self._clock = on_change, clock
        self._seen: dict[str, tuple[Any, float]] = {}  # namespace -> (renewTime, when we first saw it)
        self._skipped: frozenset[str] = frozenset()

    def skips(self, namespace: str) -> bool:
        """Whether a namespaced operator works there."""
        return namespace in self._skipped

    async def run(self) -> None:
        while True:
            try:
                await self.step()
            except (ApiError, Unavailable) as error:
                log.warning("scope_not_updated", error=str(error))
            await asyncio.sleep(MARK_S if self._namespaces else LOOK_S)

    async def step(self) -> None:
        """One round: keep our markers, or look at those of others."""
        if self._namespaces:
            for namespace in self._namespaces:
                await self._cluster.apply(self._marker(namespace))
        else:
            await self._look()

    async def _look(self) -> None:
        live = set()
        for lease in await self._cluster.list("Lease", fieldSelector=f"metadata.name={MARKER}"):
            namespace, spec = lease["metadata"]["namespace"], lease.get("spec", {})
            renewed = spec.get("renewTime")
            known = self._seen.get(namespace)
            if known is None or known[0] != renewed:
                known = self._seen[namespace] = (renewed, self._clock())
            # By our own clock from when we saw it move; one that is there when we start counts as live at first.
            if self._clock() - known[1] < float(spec.get("leaseDurationSeconds") or DURATION_S):
                live.add(namespace)
        changed, self._skipped = self._skipped ^ live, frozenset(live)
        for namespace in changed:
            log.info("namespace_left" if namespace in live else "namespace_taken", namespace=namespace)
            self._on_change(namespace)

    def _marker(self, namespace: str) -> dict[str, Any]:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": self._identity, "leaseDurationSeconds": DURATION_S, "renewTime": stamp}
        metadata = {"name": MARKER, "namespace": namespace}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
