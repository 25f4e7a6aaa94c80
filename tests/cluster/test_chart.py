"""The chart in a real cluster: its whole life, a second release beside it, and what it tells people to paste.

The first file of the folder: the release that other tests use is installed here for the first time.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lanewise.operator.crd import definitions
from tests.cluster import torch
from tests.cluster.kube import gobuild
from tests.cluster.kube.chart import CHART, INSTALL_DEADLINE, Chart, image_values, install
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.components import SOAK
from tests.cluster.kube.tools import program, wait_for
from tests.cluster.test_chart_render import NAMESPACE as RENDERED
from tests.cluster.test_chart_render import SETS, render
from tests.cluster.two_operators import wait_left_alone

NOWHERE = {"spec": {"nodeSelector": {"kubernetes.io/hostname": "nowhere"}}}
ROLES = ("router", "prefill", "decode")
DEFINITIONS = [definition["metadata"]["name"] for definition in definitions()]


def pending_service(name: str = "kept") -> dict[str, Any]:
    """A service whose pods find no node: its objects are of interest here, not its processes."""
    spec: dict[str, Any] = {"model": {"uri": "builtin://fable"}}
    spec |= {role: {"replicas": 1, "podTemplate": NOWHERE} for role in ROLES}
    return {"apiVersion": "lanewise.io/v1alpha1", "kind": "LLMService", "metadata": {"name": name}, "spec": spec}


def deployments(cluster: Cluster, namespace: str) -> dict[str, tuple[str, int]]:
    """Children by name, with what would change if somebody touched them."""
    found = cluster.items("deployments", namespace, "lanewise.io/service=kept")
    return {item["metadata"]["name"]: (item["metadata"]["uid"], item["metadata"]["generation"]) for item in found}


def has_children(cluster: Cluster, namespace: str) -> bool:
    return set(deployments(cluster, namespace)) == {f"kept-{role}" for role in ROLES}


def owners(cluster: Cluster) -> set[str]:
    """Which releases the definitions say they belong to."""
    notes = [cluster.get("crd", name)["metadata"].get("annotations", {}) for name in DEFINITIONS]
    return {f"{note.get('meta.helm.sh/release-namespace')}/{note.get('meta.helm.sh/release-name')}" for note in notes}


def operators(cluster: Cluster, chart: Chart) -> dict[str, Any]:
    return cluster.get("deployment", chart.name, chart.namespace)


def release_objects(cluster: Cluster, chart: Chart) -> list[str]:
    """What carries the release's label, but for the definitions, which are meant to stay."""
    kinds = (
        "deployments,services,serviceaccounts,configmaps,poddisruptionbudgets,networkpolicies,roles,rolebindings,leases"
    )
    there = cluster.items(kinds, chart.namespace, f"app.kubernetes.io/instance={chart.release}")
    wide = cluster.items("clusterroles,clusterrolebindings", "", f"app.kubernetes.io/instance={chart.release}")
    return [f"{item['kind']}/{item['metadata']['name']}" for item in there + wide]


def test_install_upgrade_rollback_uninstall_reinstall(own_cluster: Cluster, namespace: str) -> None:
    cluster = own_cluster
    chart = install(cluster)
    assert owners(cluster) == {f"{chart.namespace}/{chart.release}"}
    assert "Succeeded" in cluster.helm("test", chart.release, "-n", chart.namespace, "--timeout", "60s")
    first = cluster.helm("history", chart.release, "-n", chart.namespace, "--max", "1", "-o", "yaml")
    revision = str(yaml.safe_load(first)[-1]["revision"])

    cluster.apply(pending_service(), namespace=namespace)
    wait_for(lambda: has_children(cluster, namespace), "the operator to make its Deployments", 30)
    before = deployments(cluster, namespace)
    header = cluster.kubectl("get", "llmservice", "-n", namespace).splitlines()[0].split()
    assert header == ["NAME", "READY", "P", "D", "ROUTER", "REASON", "URL", "AGE"]

    chart.upgrade("replicas=1", "log.level=debug")
    assert operators(cluster, chart)["spec"]["replicas"] == 1
    cluster.helm("rollback", chart.release, revision, "-n", chart.namespace, "--wait", "--timeout", INSTALL_DEADLINE)
    assert operators(cluster, chart)["spec"]["replicas"] == 2
    assert deployments(cluster, namespace) == before, "an operator's upgrade touches no child"

    chart.uninstall()
    assert release_objects(cluster, chart) == []
    assert cluster.get("llmservice", "kept", namespace)["spec"]["model"] == {
        **pending_service()["spec"]["model"],
        "dtype": "auto",
        "revision": "main",
    }
    assert deployments(cluster, namespace) == before, "what serves goes on serving"
    cluster.delete("llmservice", "kept", namespace, "--timeout=20s")
    wait_for(lambda: not deployments(cluster, namespace), "its Deployments to go with it", 30)

    again = install(cluster)
    assert owners(cluster) == {f"{again.namespace}/{again.release}"}
    cluster.apply(pending_service(), namespace=namespace)
    wait_for(lambda: has_children(cluster, namespace), "the new release to make its Deployments", 30)


def test_a_second_release_in_another_namespace(own_cluster: Cluster, chart: Chart, namespace: str) -> None:
    """The same release name, one namespace to look after: neither sees the other's services, and each goes alone."""
    cluster = own_cluster
    before = {item: cluster.get("crd", item)["metadata"]["resourceVersion"] for item in DEFINITIONS}
    second = install(cluster, "lanewise", namespace, f"watchNamespaces={{{namespace}}}", "replicas=1")
    assert owners(cluster) == {f"{chart.namespace}/{chart.release}"}, "the definitions stay whose they were"
    assert {item: cluster.get("crd", item)["metadata"]["resourceVersion"] for item in DEFINITIONS} == before
    wait_left_alone(chart, namespace)
    cluster.apply(pending_service(), namespace=namespace)
    wait_for(lambda: has_children(cluster, namespace), "the second operator to make its Deployments", 60)
    runtime = wait_for(
        lambda: cluster.get("llmservice", "kept", namespace).get("status", {}).get("runtime"), "its status", 30
    )
    assert runtime["controlImage"] == cluster.images.control
    bound = cluster.get("rolebinding", "kept-router", namespace)["roleRef"]["name"]
    assert bound == f"lanewise-{namespace}-router"
    second.uninstall()
    assert all(condition(pod, "Ready") == "True" for pod in cluster.pods(chart.namespace, chart.selector))
    assert owners(cluster) == {f"{chart.namespace}/{chart.release}"}


def test_the_notes_work_when_pasted(own_cluster: Cluster, chart: Chart, namespace: str) -> None:
    """From NOTES.txt to a completion, in a shell, as a person would: only the local port may be taken here."""
    cluster = own_cluster
    torch.provide(cluster, namespace)
    install(cluster, "notes", namespace, f"watchNamespaces={{{namespace}}}", "replicas=1", "crds.enabled=false")
    wait_left_alone(chart, namespace)
    notes = cluster.helm("get", "notes", "notes", "-n", namespace).replace("NOTES:\n", "", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    notes = notes.replace("8000:8000", f"{port}:8000").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    script = f"set -eu\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{notes}"
    path = f"{Path(program('kubectl')).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path, "KUBECONFIG": str(cluster.kubeconfig)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r'"object": ?"text_completion"', done.stdout), done.stdout
    assert "successfully rolled out" in done.stdout
    assert 'llmservice.lanewise.io "chat" deleted' in done.stdout


@pytest.mark.parametrize("name", SETS)
def test_the_api_server_takes_what_is_rendered(name: str, cluster: Cluster, chart: Chart, tmp_path: Path) -> None:
    """Every object of every set of values, with strict field validation; monitors where their API exists."""
    for needed in (RENDERED, "team-a", "team-b"):
        if cluster.find("namespace", needed) is None:
            cluster.kubectl("create", "namespace", needed)
    objects = [item for item in render(tmp_path, SETS[name], release="dry") if item["kind"] != "PodMonitor"]
    text = yaml.safe_dump_all(objects)
    flags = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-")
    cluster.kubectl("apply", *flags, stdin=text)
    assert f"app.kubernetes.io/instance: {chart.release}" not in text


@pytest.mark.slow  # builds another Helm
@pytest.mark.timeout(1200)
def test_helm_3_installs_the_same(cluster: Cluster, chart: Chart, namespace: str) -> None:
    """The older Helm: install, test, uninstall. What it renders is what Helm 4 renders."""
    parts = [component for component in SOAK if component.name == "helm3"]
    gobuild.build(parts)
    path = next(str(folder / "helm3") for folder in gobuild.bin_dirs(parts) if (folder / "helm3").exists())

    def helm3(*args: str) -> str:
        env = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
        done = subprocess.run([path, *args], capture_output=True, text=True, timeout=180, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    values = [part for value in image_values(cluster) for part in ("--set", value)]
    values += ["--set", f"watchNamespaces={{{namespace}}}", "--set", "replicas=1"]
    rendered = cluster.helm("template", "three", str(CHART), "-n", namespace, *values)
    assert list(yaml.safe_load_all(helm3("template", "three", str(CHART), "-n", namespace, *values))) == list(
        yaml.safe_load_all(rendered)
    )
    wait = ("--wait", "--timeout", INSTALL_DEADLINE)
    helm3("install", "three", str(CHART), "-n", namespace, *wait, *values)
    try:
        helm3("test", "three", "-n", namespace, "--timeout", "60s")
    finally:
        helm3("uninstall", "three", "-n", namespace, *wait)
    assert cluster.find("deployment", "three-lanewise", namespace) is None
    assert owners(cluster) == {f"{chart.namespace}/{chart.release}"}
