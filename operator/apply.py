"""Making the cluster be what was planned, with as few writes as possible.

Owns: the order of writes, the hand-off of replicas, what is deleted, and refusals in the API server's own words.
Must not: decide what should exist (plan.py, rollout.py) or what a refusal means for the status (status.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from lanewise.operator.cluster import ApiError, scale_of
from lanewise.operator.compare import differences, stamped
from lanewise.operator.names import HANDOFF_MANAGER, MANAGER
from lanewise.operator.observed import OWNS_REPLICAS, Key, Known, Store

log = structlog.get_logger(__name__)

PRUNED = ("Service", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "ServiceMonitor", "Job")
"""Kinds of which a child that is not planned any more is deleted. Never a claim (it holds somebody's weights), never a
Deployment (it may wait for a model that is being downloaded)."""


class Writer(Protocol):
    """What of the cluster is needed here."""

    async def apply(
        self, manifest: Mapping[str, Any], *, subresource: str = "", manager: str = MANAGER, dry_run: bool = False
    ) -> dict[str, Any]: ...
    async def delete(self, kind: str, namespace: str | None, name: str, uid: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """A write that the API server did not take."""

    kind: str
    name: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.message}"


@dataclass(frozen=True, slots=True)
class Applied:
    writes: int
    refusals: tuple[Refusal, ...]


async def apply_objects(
    writer: Writer, store: Store, key: Key, objects: Iterable[Mapping[str, Any]], first_replicas: Mapping[str, int]
) -> Applied:
    """Applies what differs. `first_replicas` (by Deployment name) is for counts the resource leaves to others."""
    writes, refusals = 0, []
    for wanted in objects:
        kind, name = wanted["kind"], wanted["metadata"]["name"]
        live = store.get(key).child(kind, name)
        found = differences(wanted, live)
        if not found:
            continue
        try:
            if kind == "Deployment" and "replicas" not in wanted["spec"] and live is not None:
                writes += await _hand_off(writer, wanted, live)
            made = await writer.apply(stamped(wanted))
            writes += 1
            store.child(made, deleted=False, own=True)
            log.info("applied", key=key, kind=kind, name=name, because=found[:5])
            if live is None and first_replicas.get(name, 1) > 1 and "replicas" not in wanted["spec"]:
                await _scale(writer, wanted, first_replicas[name])
                writes += 1
        except ApiError as error:
            if not error.refused and error.status != 409:
                raise
            refusals.append(Refusal(kind, name, error.reason, error.message))
            log.warning("refused", key=key, kind=kind, name=name, status=error.status, message=error.message)
    return Applied(writes, tuple(refusals))


async def _hand_off(writer: Writer, wanted: Mapping[str, Any], live: Mapping[str, Any]) -> int:
    """A field that only we hold falls back to its default when we drop it. So somebody else holds it first."""
    if not live.get(OWNS_REPLICAS, False):
        return 0
    await _scale(writer, wanted, int(live["spec"].get("replicas", 1)))
    return 1


async def _scale(writer: Writer, wanted: Mapping[str, Any], replicas: int) -> None:
    metadata = wanted["metadata"]
    scale = scale_of(metadata["namespace"], metadata["name"], replicas)
    await writer.apply(scale, subresource="scale", manager=HANDOFF_MANAGER)
    log.info("replicas_handed_off", name=metadata["name"], namespace=metadata["namespace"], replicas=replicas)


async def prune(writer: Writer, store: Store, key: Key, objects: Iterable[Mapping[str, Any]], uid: str) -> int:
    """Deletes children of this very service that are not planned any more. Returns how many."""
    planned = {(item["kind"], item["metadata"]["name"]) for item in objects}
    known: Known = store.get(key)
    gone = 0
    for place, item in list(known.children.items()):
        if place in planned or place[0] not in PRUNED or "deletionTimestamp" in item["metadata"]:
            continue
        owners = item["metadata"].get("ownerReferences", [])
        if not any(owner.get("uid") == uid and owner.get("controller") for owner in owners):
            continue
        await writer.delete(place[0], key[0], place[1], item["metadata"]["uid"])
        log.info("deleted", key=key, kind=place[0], name=place[1], because="not planned any more")
        gone += 1
    return gone
