"""The store: what counts as a change, what is older news, and what a listing may overwrite."""

from typing import Any

from lanewise.operator.observed import OWNS_REPLICAS, Known, Store

KEY = ("n", "chat")


def service(version: int, **spec: Any) -> dict[str, Any]:
    metadata = {"namespace": "n", "name": "chat", "uid": "s", "resourceVersion": str(version)}
    return {"apiVersion": "lanewise.io/v1alpha1", "kind": "LLMService", "metadata": metadata, "spec": spec}


def child(version: int, kind: str = "Service", uid: str = "c", **fields: Any) -> dict[str, Any]:
    labels = {"lanewise.io/service": "chat"}
    metadata = {"namespace": "n", "name": "x", "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, **fields}


def fresh(now: float = 0.0) -> tuple[Store, Known]:
    store = Store(clock=lambda: now)
    store.service(service(1), deleted=False)
    store.child(child(2, spec={"a": 1}), deleted=False)
    return store, store.get(KEY)


def test_older_news_is_ignored() -> None:
    store, known = fresh()
    store.child(child(9, spec={"a": 2}), deleted=False)
    before = known.revision
    store.child(child(5, spec={"a": 1}), deleted=False)
    assert known.revision == before
    assert known.of("Service")[0]["spec"] == {"a": 2}


def test_the_deletion_of_a_predecessor_is_not_that_of_its_successor() -> None:
    store, known = fresh()
    store.child(child(4, uid="new"), deleted=False)
    store.child(child(3, uid="c"), deleted=True)
    assert known.of("Service")[0]["metadata"]["uid"] == "new"


def test_a_status_is_no_change_and_neither_is_a_pod() -> None:
    store, known = fresh()
    before = known.revision
    store.child(child(3, spec={"a": 1}, status={"ready": 1}), deleted=False)
    store.child(child(4, kind="Pod", uid="p"), deleted=False)
    store.child(child(5, kind="Pod", uid="p"), deleted=True)
    assert known.revision == before


def test_our_own_write_hides_nobody_elses() -> None:
    store, known = fresh()
    before = known.revision
    store.child(child(3, spec={"a": 2}), deleted=False, own=True)
    assert known.revision == before
    store.child(child(3, spec={"a": 2}), deleted=False)  # the watch repeats it
    assert known.revision == before
    store.child(child(4, spec={"a": 2}), deleted=True)
    assert known.revision > before


def test_a_listing_does_not_undo_what_was_heard_meanwhile() -> None:
    store, known = fresh(now=10.0)  # events at 10
    gone, made = child(2, spec={"a": 1}), child(7, kind="ConfigMap", uid="m")
    store.child({**gone, "metadata": {**gone["metadata"], "resourceVersion": "8"}}, deleted=True)
    store.child(made, deleted=False)
    store.relisted(KEY, service(1), [gone], since=9.0)
    assert [item["kind"] for item in known.children.values()] == ["ConfigMap"]
    store.relisted(KEY, service(1), [gone], since=11.0)
    assert [item["kind"] for item in known.children.values()] == ["Service"]


def test_objects_are_trimmed() -> None:
    store, known = fresh()
    ours = {"manager": "lanewise-operator", "operation": "Apply", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    theirs = {"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    for version, entry in ((5, theirs), (6, ours)):
        body = child(version, kind="Deployment", uid="d", spec={})
        body["metadata"]["managedFields"] = [entry]
        store.child(body, deleted=False)
        (kept,) = known.of("Deployment")
        assert "managedFields" not in kept["metadata"]
        assert kept[OWNS_REPLICAS] is (entry is ours)
    store.child(child(7, kind="ControllerRevision", uid="r", data={"large": 1}, revision=1), deleted=False)
    assert "data" not in known.of("ControllerRevision")[0]
    pod = child(8, kind="Pod", uid="p", spec={"nodeName": "a", "containers": []}, status={"phase": "Running", "x": 1})
    store.child(pod, deleted=False)
    (kept,) = known.of("Pod")
    assert kept["spec"] == {"nodeName": "a"}
    assert kept["status"] == {"phase": "Running"}
