"""What stays and what goes: a count that is dropped from the resource, a service without an operator, a chart."""

from __future__ import annotations

import pytest

from tests.cluster.idle import idle_service, wait_observed
from tests.cluster.kube.chart import Chart, install
from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.tools import wait_for

GONE_DEADLINE_S = 60.0
OWNER = "app.kubernetes.io/managed-by"
PASSING = ("events", "events.events.k8s.io", "leases.coordination.k8s.io", "endpoints")
"""Kinds that come and go by themselves, or show the same thing twice."""


def test_a_count_that_is_no_longer_asked_for_stays(cluster: Cluster, chart: Chart, namespace: str) -> None:
    assert chart
    cluster.apply(idle_service("kept", namespace, decode={"replicas": 8}))
    wait_observed(cluster, "kept", namespace)
    assert replicas(cluster, namespace) == 8
    patch = '[{"op": "remove", "path": "/spec/decode/replicas"}]'
    cluster.kubectl("patch", "llmservice", "kept", "-n", namespace, "--type=json", "-p", patch)
    wait_observed(cluster, "kept", namespace)
    assert replicas(cluster, namespace) == 8
    cluster.kubectl("scale", "deployment", "kept-decode", "-n", namespace, "--replicas=5")
    cluster.kubectl(
        "label", "deployment", "kept-decode", "-n", namespace, "app.kubernetes.io/managed-by=drift", "--overwrite"
    )
    wait_for(
        lambda: labels(cluster, namespace)["app.kubernetes.io/managed-by"] != "drift", "the drift to be repaired", 30
    )
    assert replicas(cluster, namespace) == 5, "without a count in the resource it is somebody else's"


def replicas(cluster: Cluster, namespace: str) -> int:
    return int(cluster.get("deployment", "kept-decode", namespace)["spec"]["replicas"])


def labels(cluster: Cluster, namespace: str) -> dict[str, str]:
    found: dict[str, str] = cluster.get("deployment", "kept-decode", namespace)["metadata"]["labels"]
    return found


@pytest.fixture
def two_services(cluster: Cluster, chart: Chart, namespace: str) -> tuple[str, set[str]]:
    """A service `leaving` beside what must stay; returns the namespace and all that must stay in it."""
    assert chart
    note = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "leaving-notes"}, "data": {"by": "hand"}}
    cluster.apply(note, namespace=namespace)
    cluster.apply(idle_service("staying", namespace))
    wait_observed(cluster, "staying", namespace)
    wait_for(lambda: len(cluster.items("pods", namespace, "lanewise.io/service=staying")) == 3, "its pods", 30)
    before = everything(cluster, namespace)
    cluster.apply(idle_service("leaving", namespace))
    wait_observed(cluster, "leaving", namespace)
    wait_for(lambda: len(cluster.items("pods", namespace, "lanewise.io/service=leaving")) == 3, "its pods", 30)
    return namespace, before


def test_a_service_goes_with_all_it_owned_while_the_operator_is_down(
    cluster: Cluster, chart: Chart, two_services: tuple[str, set[str]]
) -> None:
    namespace, before = two_services
    cluster.kubectl("scale", "deployment", chart.name, "-n", chart.namespace, "--replicas=0")
    try:
        wait_for(lambda: not cluster.items("pods", chart.namespace, chart.selector), "no operator", 60)
        cluster.delete("llmservice", "leaving", namespace, "--timeout=30s")
        wait_for(
            lambda: difference(before, everything(cluster, namespace)) == "", "only the rest to stay", GONE_DEADLINE_S
        )
    finally:
        chart.upgrade()


def test_a_service_goes_after_the_chart_is_gone(
    cluster: Cluster, chart: Chart, two_services: tuple[str, set[str]]
) -> None:
    namespace, before = two_services
    chart.uninstall()
    try:
        cluster.delete("llmservice", "leaving", namespace, "--timeout=30s")
        wait_for(
            lambda: difference(before, everything(cluster, namespace)) == "", "only the rest to stay", GONE_DEADLINE_S
        )
        cluster.kubectl("delete", "llmservice", "staying", "-n", namespace, "--timeout=30s")
    finally:
        install(cluster, chart.release, chart.namespace)


def everything(cluster: Cluster, namespace: str) -> set[str]:
    """KIND/NAME/UID of every object in a namespace."""
    listed = cluster.kubectl("api-resources", "--verbs=list", "--namespaced", "-o", "name").split()
    kinds = ",".join(kind for kind in listed if kind not in PASSING)
    return {
        f"{item['kind']}/{item['metadata']['name']}/{item['metadata']['uid']}"
        for item in cluster.items(kinds, namespace)
    }


def difference(before: set[str], now: set[str]) -> str:
    """What is missing or left over, in words; raises AssertionError so that a wait can name it."""
    problem = ", ".join([f"missing {name}" for name in before - now] + [f"left {name}" for name in now - before])
    assert not problem, problem
    return problem
