"""Objects as `kubectl get -o json` gives them, over kept connections: tests poll, and each kubectl costs a tenth of a
second of one of two cores.

Owns: which path a kind has (asked from the API server), one connection per thread. Must not: write anything.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.cluster.kube.tools import CommandFailed
from tests.cluster.raw_api import Answer, RawApi

Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """One kind of one group and version."""

    base: str
    plural: str
    kind: str
    api_version: str
    namespaced: bool

    def path(self, namespace: str, name: str = "") -> str:
        where = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{self.base}{where}/{self.plural}" + (f"/{name}" if name else "")


class Reader:
    """`kubeconfig` holds client certificates. Every method raises CommandFailed with what the API server said."""

    def __init__(self, kubeconfig: Path) -> None:
        self._kubeconfig = kubeconfig
        self._mine = threading.local()
        self._resources: dict[str, Resource] = {}

    def get(self, kind: str, name: str, namespace: str) -> Object:
        """One object; the message of a missing one has the word NotFound."""
        found = self._resource(kind)
        answer = self._call(found.path(namespace or "default", name))
        if answer.code != 200:
            raise CommandFailed(f"get {kind} {name}: {answer.body.get('reason', answer.code)}: {answer.message}")
        return _plain(answer.body, found)

    def items(self, kinds: str, namespace: str, selector: str) -> list[Object]:
        """Of all `kinds`, separated by commas; an empty namespace means all."""
        query = f"?labelSelector={quote(selector)}" if selector else ""
        found = []
        for kind in kinds.split(","):
            resource = self._resource(kind)
            answer = self._call(resource.path(namespace) + query)
            if answer.code != 200:
                raise CommandFailed(f"get {kind}: {answer.code}: {answer.message}")
            found += [_plain(item, resource) for item in answer.body.get("items") or ()]
        return found

    def _resource(self, name: str) -> Resource:
        """By plural, singular, short name, or plural.group."""
        if name.lower() not in self._resources:
            self._resources = self._discovered()
        try:
            return self._resources[name.lower()]
        except KeyError:
            raise CommandFailed(f"the API server has no resource type {name!r}") from None

    def _discovered(self) -> dict[str, Resource]:
        """The core group comes first, and what comes first keeps a name that others have as well."""
        groups = self._call("/apis").body.get("groups", ())
        bases = ["/api/v1", *(f"/apis/{group['preferredVersion']['groupVersion']}" for group in groups)]
        found: dict[str, Resource] = {}
        for base in bases:
            answer = self._call(base).body
            version = answer.get("groupVersion", "")
            group = version.rpartition("/")[0]
            for item in answer.get("resources", ()):
                if "/" in item["name"] or "list" not in item["verbs"]:
                    continue
                resource = Resource(base, item["name"], item["kind"], version, item["namespaced"])
                short = [item["name"], item.get("singularName") or item["kind"].lower(), *item.get("shortNames", ())]
                for name in (f"{item['name']}.{group}".rstrip("."), *short):
                    found.setdefault(name.lower(), resource)
        return found

    def _call(self, path: str) -> Answer:
        """Tries again once: the API server may have closed a connection that was kept."""
        problem: Exception | None = None
        for _ in range(2):
            try:
                if not hasattr(self._mine, "api"):
                    self._mine.api = RawApi(self._kubeconfig, self._kubeconfig.parent)
                answer: Answer = self._mine.api.call("GET", path)
                return answer
            except (HTTPException, OSError, ValueError) as error:
                problem = error
                self._drop()
        raise CommandFailed(f"GET {path}: {type(problem).__name__}: {problem}")

    def _drop(self) -> None:
        if hasattr(self._mine, "api"):
            self._mine.api.close()
            del self._mine.api


def _plain(item: Object, resource: Resource) -> Object:
    """With the fields that items of a list lack, and without those that kubectl hides."""
    item["metadata"].pop("managedFields", None)
    return {"apiVersion": resource.api_version, "kind": resource.kind, **item}
