"""What is known of the cluster: our services and their children, as last seen.

Owns: the store that watch events and our own writes keep fresh, and listings correct (when a service is first seen,
after a watch began anew, and at every resync). Must not: call the API or decide anything. Objects are trimmed to what
is read, so that hundreds of services fit into little memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lanewise.operator.names import MANAGER, SERVICE_LABEL

Key = tuple[str, str]
"""Namespace and name of a service."""
Manifest = dict[str, Any]

OWNS_REPLICAS = "ownsReplicas"
"""In a trimmed Deployment: whether our field manager holds spec.replicas."""


@dataclass(slots=True)
class Known:
    """One service and everything labelled as its own."""

    service: Manifest | None = None
    children: dict[tuple[str, str], Manifest] = field(default_factory=dict)  # by (kind, name)
    revision: int = 0  # moves with every change that is not only a pod's or a status
    listed_at: float | None = None  # monotonic; None: not listed yet, or a watch began anew since
    touched: dict[tuple[str, str], float] = field(default_factory=dict)  # when an event last spoke of a child

    def of(self, kind: str) -> list[Manifest]:
        return [item for (found, _), item in self.children.items() if found == kind]

    def child(self, kind: str, name: str) -> Manifest | None:
        return self.children.get((kind, name))


class Store:
    """Everything known, by service."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: defaultdict[Key, Known] = defaultdict(Known)

    def get(self, key: Key) -> Known:
        return self._known[key]

    def known_services(self) -> list[Key]:
        return [key for key, known in self._known.items() if known.service is not None]

    def forget(self, key: Key) -> None:
        self._known.pop(key, None)

    def service(self, body: Manifest, deleted: bool) -> Key:
        """A watch event or a write of ours; older news than what is known is ignored."""
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        known = self._known[key]
        if deleted:
            if known.service is not None and known.service["metadata"]["uid"] == metadata["uid"]:
                known.service = None
                known.revision += 1
        elif known.service is None or newer(body, known.service):
            old = known.service
            known.service = trim(body)
            if old is None or old["spec"] != body.get("spec") or old["metadata"]["uid"] != metadata["uid"]:
                known.revision += 1
        return key

    def child(self, body: Manifest, deleted: bool, *, own: bool = False) -> Key | None:
        """As `service`, for an object with our label; None where the label is missing.

        The answer to a write of ours (`own`) is what was wanted: it moves no revision, so that what others do in the
        meantime still does.
        """
        metadata = body["metadata"]
        name = metadata.get("labels", {}).get(SERVICE_LABEL)
        if name is None:
            return None
        key = (metadata["namespace"], name)
        known, place = self._known[key], (body["kind"], metadata["name"])
        old = known.children.get(place)
        known.touched[place] = self._clock()
        if deleted:
            if old is not None and old["metadata"]["uid"] == metadata["uid"]:
                del known.children[place]
                known.revision += body["kind"] != "Pod"
        elif old is None or newer(body, old):
            found = known.children[place] = trim(body)
            if not own and body["kind"] != "Pod" and (old is None or _lasting(old) != _lasting(found)):
                known.revision += 1
        return key

    def relisted(self, key: Key, service: Manifest | None, children: Iterable[Manifest], since: float) -> None:
        """What the API server had in full, asked at `since`. What was heard of a child after that is newer still."""
        known = self._known[key]
        found = {(item["kind"], item["metadata"]["name"]): trim(item) for item in children}
        for place, when in known.touched.items():
            if when >= since:
                found.pop(place, None)
                if place in known.children:
                    found[place] = known.children[place]
        known.children, known.touched = found, {}
        known.service = None if service is None else trim(service)
        known.revision += 1
        known.listed_at = since

    def stale(self, key: Key) -> None:
        """A watch began anew: deletions may have been missed, so the service has to be listed again."""
        self._known[key].listed_at = None


def newer(body: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """By resourceVersion, which Kubernetes lets clients compare; another uid is always news."""
    ours, theirs = body["metadata"], known["metadata"]
    if ours.get("uid") != theirs.get("uid"):
        return True
    try:
        return int(ours["resourceVersion"]) > int(theirs["resourceVersion"])
    except (KeyError, ValueError):
        return True


def trim(body: Mapping[str, Any]) -> Manifest:
    """Without what nobody reads. Pods keep their identity and state; of managed fields one fact is kept."""
    metadata = {
        name: value
        for name, value in body["metadata"].items()
        if name not in ("managedFields", "selfLink", "generateName")
    }
    kept = {name: value for name, value in body.items() if name not in ("metadata",)} | {"metadata": metadata}
    kind = body.get("kind")
    if kind == "Pod":
        spec = body.get("spec", {})
        kept["spec"] = {"nodeName": spec.get("nodeName")}
        status = body.get("status", {})
        wanted = ("phase", "podIP", "conditions", "containerStatuses", "reason", "message")
        kept["status"] = {name: status[name] for name in wanted if name in status}
    elif kind == "Deployment" and "managedFields" in body["metadata"]:
        kept[OWNS_REPLICAS] = _owns_replicas(body["metadata"]["managedFields"])
    elif kind == "ControllerRevision":
        del kept["data"]  # large, and read again in the rare case that it is needed
    elif kind == "LLMService":
        (kept["metadata"].get("annotations") or {}).pop("kubectl.kubernetes.io/last-applied-configuration", None)
    return kept


def _owns_replicas(fields: Iterable[Mapping[str, Any]]) -> bool:
    return any(
        entry.get("manager") == MANAGER
        and entry.get("operation") == "Apply"
        and "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})
        for entry in fields
    )


def _lasting(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of an object could have drifted: not its status, nor its version."""
    metadata = body["metadata"]
    kept = {name: value for name, value in body.items() if name not in ("status", "metadata")}
    return kept | {name: metadata.get(name) for name in ("labels", "annotations", "ownerReferences", "uid")}
