"""The harness itself: what the other tests here rely on."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kube import lifecycle, machine, slots
from tests.cluster.kube.audit import service_account
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.contents import ROOT
from tests.cluster.kube.tools import CommandFailed, wait_for

WEB_PORT = 8000
GRPC_PORT = 50051
START_SECOND_S = 120
GRPC_SERVER = f"""
import concurrent.futures, grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
servicer = health.HealthServicer()
servicer.set("lanewise.v1.Worker", health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port("0.0.0.0:{GRPC_PORT}")
server.start()
server.wait_for_termination()
"""
CALL_API = """
import ssl, sys, urllib.request
folder = "/var/run/secrets/kubernetes.io/serviceaccount/"
context = ssl.create_default_context(cafile=folder + "ca.crt")
token = open(folder + "token").read()
url = "https://kubernetes.default.svc.cluster.local/api/v1/namespaces/%s/%s" % tuple(sys.argv[1:])
request = urllib.request.Request(url, headers={"Authorization": "Bearer " + token})
print(urllib.request.urlopen(request, context=context).status)
"""

SECOND = """
import sys
from tests.cluster.kube import lifecycle
print(lifecycle.start().slot.index, flush=True)
sys.stdin.read()
"""


def pod(name: str, image: str, command: list[str], **container: object) -> dict[str, Any]:
    """A pod that may do nothing it does not need, labelled app=NAME."""
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    only = {"name": "main", "image": image, "command": command, "securityContext": security, **container}
    spec = {"containers": [only], "terminationGracePeriodSeconds": 1}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def web(cluster: Cluster) -> dict[str, Any]:
    return pod("web", cluster.images.app, ["python", "-m", "http.server", str(WEB_PORT), "--directory", "/etc"])


def service(name: str, port: int) -> Mapping[str, Any]:
    spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def wait_ready(cluster: Cluster, name: str, namespace: str) -> dict[str, Any]:
    wait_for(lambda: condition(cluster.get("pod", name, namespace), "Ready") == "True", f"pod {name}", 60)
    return cluster.get("pod", name, namespace)


def fetch(address: str, path: str = "/nsswitch.conf") -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=2) as reply:
        return str(reply.read().decode())


def answers(address: str) -> bool:
    try:
        return "hosts" in fetch(address)
    except OSError:
        return False


def test_a_service_is_reached_by_name_from_inside_and_outside(cluster: Cluster, namespace: str) -> None:
    cluster.apply(web(cluster), service("web", WEB_PORT), namespace=namespace)
    cluster.apply(pod("client", cluster.images.app, ["sleep", "600"]), namespace=namespace)
    wait_ready(cluster, "web", namespace)
    wait_ready(cluster, "client", namespace)
    host = f"web.{namespace}.svc"
    wait_for(lambda: answers(cluster.resolve(host)), "the Service to answer outside", 20)
    url = f"http://{host}.cluster.local/nsswitch.conf"
    code = f"import urllib.request; print(urllib.request.urlopen('{url}', timeout=5).status)"
    assert cluster.kubectl("exec", "client", "-n", namespace, "--", "python", "-c", code).strip() == "200"
    assert "GET /nsswitch.conf" in cluster.logs("web", namespace)


def test_a_grpc_probe_makes_a_pod_ready(cluster: Cluster, namespace: str) -> None:
    probe = {"grpc": {"port": GRPC_PORT, "service": "lanewise.v1.Worker"}, "periodSeconds": 1}
    wrong = {"grpc": {"port": GRPC_PORT, "service": "nobody"}, "periodSeconds": 1}
    command = ["python", "-c", GRPC_SERVER]
    cluster.apply(
        pod("right", cluster.images.control, command, readinessProbe=probe),
        pod("wrong", cluster.images.control, command, readinessProbe=wrong),
        namespace=namespace,
    )
    wait_ready(cluster, "right", namespace)
    wait_for(lambda: "Running" in cluster.get("pod", "wrong", namespace)["status"]["phase"], "the other pod", 60)
    assert condition(cluster.get("pod", "wrong", namespace), "Ready") == "False"


def test_the_audit_log_names_the_pod_behind_a_request(own_cluster: Cluster, namespace: str) -> None:
    mark = own_cluster.audit.mark()
    own_cluster.apply(pod("caller", own_cluster.images.app, ["sleep", "600"]), namespace=namespace)
    wait_ready(own_cluster, "caller", namespace)
    with pytest.raises(CommandFailed, match="403"):
        own_cluster.kubectl(
            "exec", "caller", "-n", namespace, "--", "python", "-c", CALL_API, namespace, "secrets", deadline_s=30
        )
    asked = own_cluster.audit.events(mark, user=service_account(namespace, "default"), resource="secrets")
    (event,) = asked
    assert (event.verb, event.namespace, event.code, event.pod) == ("list", namespace, 403, "caller")
    assert not event.is_write
    created = own_cluster.audit.events(mark, user="admin", verbs=["patch"], resource="pods", namespace=namespace)
    assert [(event.name, event.kind, event.is_write) for event in created] == [("caller", "pods", True)]


def test_the_api_server_can_be_killed(own_cluster: Cluster, namespace: str) -> None:
    own_cluster.apply(web(own_cluster), namespace=namespace)
    before = wait_ready(own_cluster, "web", namespace)
    own_cluster.restart_apiserver()
    after = own_cluster.get("pod", "web", namespace)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert answers(f"{after['status']['podIP']}:{WEB_PORT}")


def test_a_pod_can_be_stopped_and_resumed(own_cluster: Cluster, namespace: str) -> None:
    own_cluster.apply(web(own_cluster), namespace=namespace)
    address = f"{wait_ready(own_cluster, 'web', namespace)['status']['podIP']}:{WEB_PORT}"
    wait_for(lambda: answers(address), "the pod to answer", 20)
    own_cluster.signal_pod("web", namespace, signal.SIGSTOP)
    assert not answers(address)
    own_cluster.signal_pod("web", namespace, signal.SIGCONT)
    wait_for(lambda: answers(address), "the pod to answer again", 20)


def test_a_killed_owner_takes_its_cluster_along_and_nothing_of_it_stays(own_cluster: Cluster, namespace: str) -> None:
    own_cluster.apply(web(own_cluster), namespace=namespace)
    before = wait_ready(own_cluster, "web", namespace)
    with subprocess.Popen(
        [sys.executable, "-c", SECOND], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        other = slots.Slot(int(owner.stdout.readline()))
        assert other.index != own_cluster.slot.index
        second = Cluster(other.kubeconfig, lifecycle.attach(other))
        assert [node["metadata"]["name"] for node in second.items("nodes")] == [other.node]
        assert not second.find("pod", "web", namespace)
        assert other not in lifecycle.left_running()
        owner.kill()
    wait_for(lambda: other in lifecycle.left_running(), "the second cluster to end", 20)
    lifecycle.down(other)
    assert traces(other) == []
    after = own_cluster.get("pod", "web", namespace)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert answers(f"{after['status']['podIP']}:{WEB_PORT}")


def traces(slot: slots.Slot) -> list[str]:
    """What is left of a cluster on this machine."""
    found = [str(path) for path in (slot.root, slot.lock) if path.exists()]
    found += [str(path) for path in machine.cgroups(slot)]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {slot.root}" in line]
    found += [line for line in machine.command("ip", "addr").splitlines() if f" {slot.veth}" in line]
    found += [line for line in machine.command("ip", "route").splitlines() if slot.veth in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        found += [command] if f"{slot.root}/" in command else []
    return found
