"""Which writes are sent, in which order, and what a refusal leaves behind; against a cluster that records them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest

from lanewise.operator.apply import apply_objects, prune
from lanewise.operator.cluster import ApiError
from lanewise.operator.compare import stamped
from lanewise.operator.names import MANAGER
from lanewise.operator.observed import Store

KEY = ("n", "chat")
LABELS = {"lanewise.io/service": "chat"}


class Recorder:
    """Takes every write but those of `refuse`; answers as the API server."""

    def __init__(self) -> None:
        self.writes: list[tuple[Any, ...]] = []
        self.refuse: dict[str, ApiError] = {}
        self.version = 100

    async def apply(
        self, manifest: Mapping[str, Any], *, subresource: str = "", manager: str = MANAGER, dry_run: bool = False
    ) -> dict[str, Any]:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind in self.refuse:
            raise self.refuse[kind]
        self.writes.append((kind, name, manager, manifest["spec"].get("replicas")))
        made = deepcopy(dict(manifest))
        self.version += 1
        made["metadata"] |= {"uid": "u", "resourceVersion": str(self.version)}
        return made

    async def delete(self, kind: str, namespace: str | None, name: str, uid: str) -> None:
        self.writes.append(("delete", kind, name, uid))


def deployment(**spec: Any) -> dict[str, Any]:
    metadata = {"namespace": "n", "name": "chat-decode", "labels": LABELS}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}


def seen(store: Store, manifest: dict[str, Any], **metadata: Any) -> None:
    body = deepcopy(stamped(manifest))
    body["metadata"] |= {"uid": "u", "resourceVersion": "5", **metadata}
    store.child(body, deleted=False)


def owned(manager: str) -> list[dict[str, Any]]:
    return [{"manager": manager, "operation": "Apply", "fieldsV1": {"f:spec": {"f:replicas": {}}}}]


async def test_what_is_as_it_should_be_is_not_written() -> None:
    store, cluster = Store(), Recorder()
    seen(store, deployment(replicas=2))
    found = await apply_objects(cluster, store, KEY, [deployment(replicas=2)], {})
    assert (found.writes, cluster.writes) == (0, [])


async def test_a_count_is_handed_off_before_it_is_dropped() -> None:
    store, cluster = Store(), Recorder()
    seen(store, deployment(replicas=8), managedFields=owned(MANAGER))
    await apply_objects(cluster, store, KEY, [deployment()], {})
    assert cluster.writes == [
        ("Scale", "chat-decode", "lanewise-handoff", 8),
        ("Deployment", "chat-decode", MANAGER, None),
    ]


async def test_a_count_of_somebody_else_is_left_alone() -> None:
    store, cluster = Store(), Recorder()
    seen(store, deployment(replicas=8), managedFields=owned("kubectl"))
    await apply_objects(cluster, store, KEY, [deployment(paused=False)], {})
    assert [write[0] for write in cluster.writes] == ["Deployment"]


async def test_the_first_count_is_the_policys_minimum() -> None:
    store, cluster = Store(), Recorder()
    await apply_objects(cluster, store, KEY, [deployment()], {"chat-decode": 3})
    assert cluster.writes == [
        ("Deployment", "chat-decode", MANAGER, None),
        ("Scale", "chat-decode", "lanewise-handoff", 3),
    ]


async def test_a_refusal_is_kept_and_the_rest_goes_on() -> None:
    store, cluster = Store(), Recorder()
    cluster.refuse["Service"] = ApiError(403, "Forbidden", "exceeded quota: q")
    service = {**deployment(), "kind": "Service", "apiVersion": "v1"}
    found = await apply_objects(cluster, store, KEY, [service, deployment(replicas=1)], {})
    assert [str(item) for item in found.refusals] == ["Service chat-decode: exceeded quota: q"]
    assert [write[0] for write in cluster.writes] == ["Deployment"]


async def test_an_answer_that_is_no_refusal_ends_the_look() -> None:
    cluster = Recorder()
    cluster.refuse["Deployment"] = ApiError(404, "NotFound", "no namespace")
    with pytest.raises(ApiError):
        await apply_objects(cluster, Store(), KEY, [deployment()], {})


async def test_only_what_is_ours_and_not_planned_is_deleted() -> None:
    store, cluster = Store(), Recorder()
    mine = [{"uid": "service", "controller": True}]
    for kind, name, owners in (
        ("Service", "old", mine),
        ("Service", "kept", mine),
        ("Service", "foreign", []),
        ("PersistentVolumeClaim", "weights", mine),
        ("Deployment", "waiting", mine),
    ):
        item = {**deployment(), "kind": kind}
        item["metadata"] = {**item["metadata"], "name": name, "ownerReferences": owners}
        seen(store, item)
    kept = {**deployment(), "kind": "Service", "metadata": {"name": "kept"}}
    assert await prune(cluster, store, KEY, [kept], "service") == 1
    assert cluster.writes == [("delete", "Service", "old", "u")]
