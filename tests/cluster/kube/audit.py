"""The API server's audit log as objects: who asked for what, when, and what came of it.

Owns: reading the log from a mark on. Must not: judge what it reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"


@dataclass(frozen=True)
class Event:
    """One finished request. `resource` is plural; `subresource` and `name` may be empty; times are Unix seconds."""

    user: str
    groups: tuple[str, ...]
    verb: str
    api_group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    code: int
    received_s: float
    ended_s: float
    uri: str
    user_agent: str
    source: str
    extra: dict[str, list[str]]
    annotations: dict[str, str]

    @property
    def pod(self) -> str:
        """Name of the pod whose token was used, or empty."""
        return next(iter(self.extra.get(_POD_NAME, [])), "")

    @property
    def pod_uid(self) -> str:
        return next(iter(self.extra.get(_POD_UID, [])), "")

    @property
    def kind(self) -> str:
        """The resource with its group as RBAC names it: deployments.apps/scale."""
        name = f"{self.resource}.{self.api_group}".rstrip(".")
        return f"{name}/{self.subresource}" if self.subresource else name

    @property
    def is_write(self) -> bool:
        """Whether the request meant to change something and was not refused or a dry run."""
        return self.verb in WRITES and self.code < 400 and "dryRun=" not in self.uri


class AuditLog:
    """The log of one cluster. A mark is a position in it; take one before the action whose requests are wanted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def events(
        self,
        since: int = 0,
        *,
        user: str | None = None,
        verbs: Iterable[str] | None = None,
        resource: str | None = None,
        namespace: str | None = None,
    ) -> Iterator[Event]:
        """Requests that ended after the mark, in the order in which they ended; a filter that is None lets all pass."""
        wanted = None if verbs is None else frozenset(verbs)
        needles = [f'"{value}"'.encode() for value in (user, resource, namespace) if value is not None]
        with self.path.open("rb") as file:
            file.seek(since)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written
                if not all(needle in line for needle in needles):
                    continue  # reading a line as JSON costs far more than that
                event = _event(json.loads(line))
                if (
                    event is not None
                    and (user is None or event.user == user)
                    and (wanted is None or event.verb in wanted)
                    and (resource is None or event.resource == resource)
                    and (namespace is None or event.namespace == namespace)
                ):
                    yield event


def service_account(namespace: str, name: str) -> str:
    """The user name of a ServiceAccount."""
    return f"system:serviceaccount:{namespace}:{name}"


def _event(raw: dict[str, object]) -> Event | None:
    """None for what is not the end of a request, and for requests to no resource (/healthz)."""
    target, user = raw.get("objectRef"), raw.get("user")
    if (
        raw.get("stage") not in ("ResponseComplete", "Panic")
        or not isinstance(target, dict)
        or not isinstance(user, dict)
    ):
        return None
    status, sources = raw.get("responseStatus"), raw.get("sourceIPs")
    extra, annotations = user.get("extra"), raw.get("annotations")
    return Event(
        user=str(user.get("username", "")),
        groups=tuple(user.get("groups", ())),
        verb=str(raw.get("verb", "")),
        api_group=str(target.get("apiGroup", "")),
        resource=str(target.get("resource", "")),
        subresource=str(target.get("subresource", "")),
        namespace=str(target.get("namespace", "")),
        name=str(target.get("name", "")),
        code=int(status.get("code", 0)) if isinstance(status, dict) else 0,
        received_s=_seconds(raw.get("requestReceivedTimestamp")),
        ended_s=_seconds(raw.get("stageTimestamp")),
        uri=str(raw.get("requestURI", "")),
        user_agent=str(raw.get("userAgent", "")),
        source=str(sources[0]) if isinstance(sources, list) and sources else "",
        extra=extra if isinstance(extra, dict) else {},
        annotations=annotations if isinstance(annotations, dict) else {},
    )


def _seconds(stamp: object) -> float:
    return datetime.fromisoformat(str(stamp)).timestamp()
