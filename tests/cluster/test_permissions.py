"""The operator may do what it does and nothing else: the chart's roles against the API server's audit log.

A service lives through everything that an operator has to act on; then every (group, resource, verb) that the chart's
roles grant must have been used, and nothing that was tried may have been refused. There is no list of exceptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kube.audit import service_account
from tests.cluster.kube.chart import Chart, install
from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.tools import wait_for
from tests.cluster.two_operators import wait_left_alone

MONITORING = Path(__file__).parent / "optional" / "monitoring.yaml"
NOWHERE = {"spec": {"nodeSelector": {"kubernetes.io/hostname": "nowhere"}}}
NAME = "rights"
DEADLINE_S = 90
LEFT_OVER = ("Service", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "ServiceMonitor", "Job")
APIS = {
    "Service": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "Job": "batch/v1",
}

POLICY = {
    "apiVersion": "lanewise.io/v1alpha1",
    "kind": "ScalingPolicy",
    "metadata": {"name": NAME},
    "spec": {
        "targetRef": {"name": NAME},
        "prefill": {"max": 8},
        "decode": {"max": 8},
        "scaleToZero": {"after": "1s"},
    },
}

Right = tuple[str, str, str]
"""API group, resource with its subresource, verb."""


@dataclass(frozen=True)
class Request:
    """One line of the audit log that has an answer. A watch has one as soon as it is open."""

    right: Right
    code: int
    forbidden: bool
    """By the roles. A namespace that is being deleted refuses things too, with the same code."""


class Requests:
    """All that an account has asked for so far; the log is read on from where it was read last."""

    def __init__(self, cluster: Cluster, user: str) -> None:
        self._path, self._user, self._at = cluster.audit.path, user, 0
        self._found: list[Request] = []

    def all(self) -> list[Request]:
        with self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                self._at += len(line)
                if self._user.encode() in line:
                    self._found += self._read(json.loads(line))
        return self._found

    def _read(self, event: dict[str, Any]) -> Iterator[Request]:
        target, answer = event.get("objectRef"), event.get("responseStatus")
        if event["user"]["username"] != self._user or not target or not answer:
            return
        resource = "/".join(filter(None, (target.get("resource", ""), target.get("subresource"))))
        right = (target.get("apiGroup", ""), resource, event["verb"])
        decision = event.get("annotations", {}).get("authorization.k8s.io/decision")
        yield Request(right, int(answer.get("code", 0)), decision == "forbid")


def used(found: list[Request]) -> set[Right]:
    """What was done; some requests need a second right, which they have used as well when they succeed."""
    done = {request.right for request in found if request.code < 300}
    for request in found:
        group, resource, verb = request.right
        if verb == "patch" and request.code == 201:  # server-side apply of what was not there
            done.add((group, resource, "create"))
            if resource == "rolebindings":  # the API server asks whether the role may be bound
                done.add((group, "clusterroles", "bind"))
    return done


def granted(cluster: Cluster, account: str, namespace: str) -> set[Right]:
    """Every right that bindings give to the account."""
    found: set[Right] = set()
    bindings = cluster.items("rolebindings") + cluster.items("clusterrolebindings")
    for binding in bindings:
        subjects = [(item["kind"], item["name"], item.get("namespace")) for item in binding.get("subjects", ())]
        if ("ServiceAccount", account, namespace) not in subjects:
            continue
        role = binding["roleRef"]
        where = binding["metadata"].get("namespace", "") if role["kind"] == "Role" else ""
        for rule in cluster.get(role["kind"].lower(), role["name"], where)["rules"]:
            found |= {(g, r, v) for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    return found


@pytest.fixture(scope="module")
def monitoring(cluster: Cluster) -> None:
    """The optional APIs are there, so that the rules that depend on them count."""
    cluster.apply(MONITORING.read_text())
    names = [f"{kind}s.monitoring.coreos.com" for kind in ("podmonitor", "servicemonitor")]
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", *(f"crd/{name}" for name in names))


def service(spec: dict[str, Any]) -> dict[str, Any]:
    """Its router runs; its workers find no node."""
    workers = {role: {"replicas": 1, "podTemplate": NOWHERE} for role in ("prefill", "decode")}
    body = {"model": {"uri": "builtin://fable"}, "router": {"replicas": 1}, **workers, **spec}
    return {"apiVersion": "lanewise.io/v1alpha1", "kind": "LLMService", "metadata": {"name": NAME}, "spec": body}


def live_a_life(chart: Chart, namespace: str, seen: Callable[[Right], bool]) -> None:
    """Everything that makes an operator act. `seen` tells whether it has used a right by now."""
    cluster = chart.cluster

    def act(spec: dict[str, Any], *wanted: Right) -> None:
        cluster.kubectl("patch", "llmservice", NAME, "-n", namespace, "--type=merge", "-p", json.dumps({"spec": spec}))
        for right in wanted:
            wait_for(lambda right=right: seen(right), f"the operator to {right}", DEADLINE_S)  # type: ignore[misc]

    hub = service({"model": {"uri": "hf://owner/name", "cache": {"size": "1Gi"}}})
    hub["metadata"]["name"] = "hub"
    cluster.apply(service({}), hub, namespace=namespace)
    wait_for(lambda: cluster.find("deployment", f"{NAME}-prefill", namespace), "the Deployments", DEADLINE_S)
    # Left over from an older rendering: what is ours and not planned any more is deleted.
    uid = cluster.get("llmservice", NAME, namespace)["metadata"]["uid"]
    cluster.apply(*(left_over(kind, uid) for kind in LEFT_OVER), namespace=namespace)
    # Monitors are not watched; a new leader looks at everything.
    leader = wait_for(chart.leader, "a leader", DEADLINE_S)
    cluster.delete("pod", leader, chart.namespace, "--wait=false")
    # Another fingerprint: decode goes first, prefill is held to its revision.
    act({"model": {"dtype": "float16"}}, ("apps", "controllerrevisions", "get"))
    # Counts that are handed to somebody else, and a policy that finds nothing to do (it asks the router).
    act({"prefill": {"replicas": None}, "decode": {"replicas": None}}, ("apps", "deployments/scale", "patch"))
    cluster.apply(POLICY, namespace=namespace)
    # More templates than are kept.
    for number in range(7):
        label = {"metadata": {"annotations": {"example.com/number": str(number)}}}
        before = decode_template(cluster, namespace)
        act({"decode": {"podTemplate": label}})
        wait_for(lambda: decode_template(cluster, namespace) != before, "a new template", DEADLINE_S)  # noqa: B023
    # Something to tell the user.
    act({"transfer": {"encryption": "Full"}}, ("", "events", "create"))


def decode_template(cluster: Cluster, namespace: str) -> str:
    found = cluster.get("deployment", f"{NAME}-decode", namespace)["spec"]["template"]["metadata"]
    return json.dumps(found, sort_keys=True)


def left_over(kind: str, uid: str) -> dict[str, Any]:
    owner = {"apiVersion": "lanewise.io/v1alpha1", "kind": "LLMService", "name": NAME, "uid": uid, "controller": True}
    labels = {"lanewise.io/service": NAME, "app.kubernetes.io/component": "old"}
    labels |= {"app.kubernetes.io/managed-by": "lanewise-operator", "app.kubernetes.io/instance": NAME}
    selector = {"matchLabels": {"old": "yes"}}
    container = {"name": "old", "image": "registry.local/app:1"}
    spec: dict[str, dict[str, Any]] = {
        "Service": {"ports": [{"port": 1}], "selector": {"old": "yes"}},
        "NetworkPolicy": {"podSelector": selector, "policyTypes": ["Ingress"]},
        "PodDisruptionBudget": {"maxUnavailable": 1, "selector": selector},
        "Job": {"template": {"spec": {**NOWHERE["spec"], "restartPolicy": "Never", "containers": [container]}}},
    }
    metadata = {"name": f"{NAME}-old", "labels": labels, "ownerReferences": [owner]}
    return {"apiVersion": APIS[kind], "kind": kind, "metadata": metadata, "spec": spec.get(kind, {})}


def check(cluster: Cluster, chart: Chart, namespace: str) -> None:
    asked = Requests(cluster, service_account(chart.namespace, chart.name))
    before = len(asked.all())
    live_a_life(chart, namespace, lambda right: right in used(asked.all()))
    wanted = granted(cluster, chart.name, chart.namespace)
    assert len(wanted) > 40

    def all_used() -> bool:
        missing = wanted - used(asked.all())
        assert not missing, f"granted and never used: {sorted(missing)}"
        return True

    wait_for(all_used, "every right to be used", DEADLINE_S)
    # Of this life: while other tests uninstalled the chart, its roles went before its pods did.
    forbidden = {request.right for request in asked.all()[before:] if request.forbidden}
    assert forbidden == set(), "asked for and not granted"


def test_every_right_of_the_cluster_wide_operator_is_used(
    own_cluster: Cluster, monitoring: None, chart: Chart, namespace: str
) -> None:
    chart.upgrade()  # it may have been installed before the optional APIs were there
    check(own_cluster, chart, namespace)


def test_every_right_of_a_namespaced_operator_is_used(
    own_cluster: Cluster, monitoring: None, chart: Chart, namespace: str
) -> None:
    values = (f"watchNamespaces={{{namespace}}}", "replicas=1", "crds.enabled=false")
    second = install(own_cluster, "rights-lanewise", namespace, *values)
    wait_left_alone(chart, namespace)
    check(own_cluster, second, namespace)


def test_a_router_may_read_endpoints_of_its_namespace_and_nothing_else(
    cluster: Cluster, chart: Chart, namespace: str
) -> None:
    cluster.apply(service({}), namespace=namespace)
    wait_for(lambda: cluster.find("rolebinding", f"{NAME}-router", namespace), "the router's binding", DEADLINE_S)
    rights = granted(cluster, f"{NAME}-router", namespace)
    assert rights == {("discovery.k8s.io", "endpointslices", verb) for verb in ("list", "watch")}
    user = service_account(namespace, f"{NAME}-router")
    for verb, resource, where, wanted in (
        ("list", "endpointslices.discovery.k8s.io", namespace, "yes"),
        ("list", "endpointslices.discovery.k8s.io", chart.namespace, "no"),
        ("list", "pods", namespace, "no"),
        ("get", "secrets", namespace, "no"),
    ):
        command = ("auth", "can-i", verb, resource, "-n", where, "--as", user)
        assert answer(cluster, *command) == wanted, f"{verb} {resource} in {where}"
    assert granted(cluster, f"{NAME}-worker", namespace) == set()
    assert cluster.get("serviceaccount", f"{NAME}-worker", namespace)["automountServiceAccountToken"] is False


def answer(cluster: Cluster, *args: str) -> str:
    """`kubectl auth can-i` ends with status 1 when the answer is no."""
    try:
        return cluster.kubectl(*args).strip()
    except RuntimeError as error:
        return "no" if str(error).strip().endswith("no") else str(error)
