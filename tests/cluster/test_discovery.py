"""A router's discovery on a real API server, with the rights that the chart gives it and real pods coming and going."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import yaml

from lanewise.router.discovery import View
from lanewise.router.discovery_kubernetes import KubernetesDiscovery
from tests.cluster.kube.cluster import Cluster
from tests.router.stand_in_api import Watched, followed

DEADLINE_S = 120.0  # pods start slowly on a busy machine
PORT = 50061
# Ready while the file is there; goes on for some seconds after SIGTERM, as a worker that drains.
POD = "trap 'sleep 8; exit 0' TERM; while true; do sleep 0.2; done"


def manifests(image: str) -> list[dict[str, Any]]:
    labels = {"app": "worker"}
    container = {
        "name": "worker",
        "image": image,
        "command": ["/bin/sh", "-c", POD],
        "ports": [{"name": "grpc", "containerPort": PORT}],
        "readinessProbe": {"exec": {"command": ["cat", "/tmp/ready"]}, "periodSeconds": 1},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {"containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}], "terminationGracePeriodSeconds": 30}
    subject = {"kind": "ServiceAccount", "name": "router"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "router"}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "router"}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": "router"},
            "rules": [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "router"},
            "subjects": [subject],
            "roleRef": role,
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "workers"},
            "spec": {
                "clusterIP": "None",
                "selector": labels,
                "ports": [{"name": "grpc", "port": PORT, "targetPort": "grpc"}],
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "worker"},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
    ]


class Account:
    """What the kubelet mounts into a pod: token and CA of a ServiceAccount."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self.cluster, self.namespace, self.folder = cluster, namespace, folder
        config = yaml.safe_load(cluster.kubeconfig.read_text())
        server = config["clusters"][0]["cluster"]
        authority = server.get("certificate-authority-data")
        pem = base64.b64decode(authority) if authority else Path(server["certificate-authority"]).read_bytes()
        (folder / "ca.crt").write_bytes(pem)
        self.url = str(server["server"])

    def sign_in(self, name: str) -> None:
        (self.folder / "token").write_text(self.cluster.kubectl("create", "token", name, "-n", self.namespace))

    def discovery(self) -> KubernetesDiscovery:
        return KubernetesDiscovery((f"{self.namespace}/workers",), api=self.url, account_dir=str(self.folder))


async def seen(watched: Watched, condition: Callable[[View], bool], what: str) -> View:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not watched.views or not condition(watched.view):
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not seen: {what}; the views were {watched.views}") from None
    return watched.view


def run(test: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        await test
        await asyncio.sleep(0.25)  # TLS connections that were closed take a few rounds of the loop to be gone

    asyncio.run(whole())


def test_pods_come_become_ready_and_terminate(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    cluster.apply(*manifests(cluster.images.app), namespace=namespace)
    account = Account(cluster, namespace, tmp_path)
    account.sign_in("router")

    async def kubectl(*args: str) -> str:
        return await asyncio.to_thread(cluster.kubectl, "-n", namespace, *args)

    async def pods() -> dict[str, str]:
        found = json.loads(await kubectl("get", "pods", "-o", "json"))["items"]
        return {f"{p['status'].get('podIP')}:{PORT}": p["metadata"]["name"] for p in found}

    async def test() -> None:
        source = account.discovery()
        async with followed(source) as watched:
            view = await seen(watched, lambda v: len(v) == 2, "two pods")
            assert not any(endpoint.ready for endpoint in view.values())
            first, second = sorted(view)
            names = await pods()
            assert set(names) == {first, second}
            for address in (first, second):
                await kubectl("exec", names[address], "--", "sh", "-c", ": > /tmp/ready")
            await seen(watched, lambda v: all(endpoint.ready for endpoint in v.values()), "both ready")
            await kubectl("delete", "pod", names[first], "--wait=false")
            view = await seen(watched, lambda v: first in v and v[first].terminating, "one terminating")
            assert not view[first].ready
            assert view[second].ready
            await seen(watched, lambda v: first not in v and len(v) == 2, "it left, and its successor came")
            await kubectl("scale", "deployment", "worker", "--replicas=0")
            await seen(watched, lambda v: not v, "scaled to zero")
            assert source.freshness.synced
            assert source.freshness.error == ""

    run(test())


def test_it_goes_on_after_the_api_server_restarts(own_cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    own_cluster.apply(*manifests(own_cluster.images.app), namespace=namespace)
    account = Account(own_cluster, namespace, tmp_path)
    account.sign_in("router")

    async def test() -> None:
        source = account.discovery()
        async with followed(source) as watched:
            before = await seen(watched, lambda v: len(v) == 2, "two pods")
            watched.views = [before]
            await asyncio.to_thread(own_cluster.restart_apiserver)
            assert watched.views == [before]
            await asyncio.to_thread(
                own_cluster.kubectl, "-n", namespace, "scale", "deployment", "worker", "--replicas=3"
            )
            await seen(watched, lambda v: len(v) == 3, "a third pod")
            assert all(len(view) >= 2 for view in watched.views)
            assert source.freshness.error == ""

    run(test())


def test_rights_are_needed_and_a_new_token_is_taken(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    cluster.apply(*manifests(cluster.images.app), namespace=namespace)
    account = Account(cluster, namespace, tmp_path)
    account.sign_in("default")

    async def test() -> None:
        source = account.discovery()
        async with followed(source) as watched:
            async with asyncio.timeout(DEADLINE_S):
                while "403" not in source.freshness.error:
                    await asyncio.sleep(0.05)
            assert watched.views == []
            assert not source.freshness.synced
            await asyncio.to_thread(account.sign_in, "router")
            await seen(watched, lambda v: len(v) == 2, "two pods")

    run(test())
