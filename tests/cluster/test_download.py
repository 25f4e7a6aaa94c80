"""A model from a hub: one Job downloads it once, is killed half-way, goes on where it was, and workers start from it.

The hub is a real HTTP server on this machine, seen by the pods at the harness's own address; it counts what it sends.
"""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fleet import HTTP_PORT
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for
from tests.e2e.models import FABLE
from tests.engine.hub import COMMIT, REPO, Hub

pytestmark = pytest.mark.timeout(400)
NAME = "hubbed"
TOKEN = "hf_let_me_in"
BIG = "tokenizer.bin"  # wanted by its name, and read by nobody
BIG_BYTES = 64 << 20
DEADLINE_S = 150


@pytest.fixture
def hub(own_cluster: Cluster) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in FABLE.iterdir() if path.is_file() and path.name != "README.md"}
    with Hub({**files, BIG: os.urandom(BIG_BYTES)}, token=TOKEN, host=own_cluster.slot.host_ip) as served:
        yield served


def manifests(cluster: Cluster, namespace: str, folder: Path, hub: Hub) -> list[dict[str, Any]]:
    """A claim on a folder of this machine, the hub's token, and a service that caches its model there."""
    template: Any = cluster.worker_pod_template()
    template["spec"]["containers"][0]["env"].append({"name": "HF_ENDPOINT", "value": hub.url})
    no_gpu = {"nvidia.com/gpu": "0"}  # which a model that is not built in would get
    template["spec"]["containers"][0]["resources"] = {"limits": no_gpu, "requests": no_gpu}
    worker = {"replicas": 1, "resources": {"requests": {"cpu": "50m"}}, "podTemplate": template}
    storage = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": namespace},
            "spec": {
                **storage,
                "capacity": {"storage": "1Gi"},
                "hostPath": {"path": str(folder), "type": "Directory"},
                "claimRef": {"namespace": namespace, "name": "models"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "models", "namespace": namespace},
            "spec": {**storage, "volumeName": namespace, "resources": {"requests": {"storage": "1Gi"}}},
        },
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "hub", "namespace": namespace},
            "stringData": {"token": TOKEN},
        },
        {
            "apiVersion": "lanewise.io/v1alpha1",
            "kind": "LLMService",
            "metadata": {"name": NAME, "namespace": namespace},
            "spec": {
                "model": {
                    "uri": f"hf://{REPO}",
                    "servedName": "fable",
                    "cache": {"claim": "models"},
                    "tokenSecretRef": {"name": "hub", "key": "token"},
                },
                "disaggregation": "Always",
                "prefill": worker,
                "decode": worker,
                "router": {"replicas": 1, "resources": {"requests": {"cpu": "50m"}}},
            },
        },
    ]


def test_one_download_per_commit_resumed_after_a_kill(
    own_cluster: Cluster, chart: Chart, namespace: str, hub: Hub, tmp_path: Path
) -> None:
    assert chart
    cluster, folder = own_cluster, tmp_path / "models"
    folder.mkdir()
    folder.chmod(0o777)  # the pods are nobody in particular
    hub.bytes_per_s = BIG_BYTES / 70  # numbers in a status are at most 30 s old
    cluster.apply(*manifests(cluster, namespace, folder, hub))
    try:
        progress = wait_for(lambda: under_way(cluster, namespace), "progress in ModelReady", DEADLINE_S)
        wait_for(lambda: hub.sent.get(BIG, 0) > BIG_BYTES / 3, "a third of the download", DEADLINE_S)
        assert condition(service(cluster, namespace), "ModelReady") != "True"
        (pod,) = cluster.pods(namespace, f"app.kubernetes.io/component=download,lanewise.io/service={NAME}")
        cluster.signal_pod(pod["metadata"]["name"], namespace, signal.SIGKILL)
        sent = dict(hub.sent)
        hub.bytes_per_s = 0
        wait_for(lambda: condition(service(cluster, namespace), "Ready") == "True", f"{NAME} to be Ready", DEADLINE_S)
        firsts = sorted(first for name, first in hub.gets if name == BIG)
        print(f"killed at {progress}; {sent[BIG]} bytes had left, and the next pod began at {firsts[-1]}")
        assert firsts[0] == 0
        assert firsts[-1] > BIG_BYTES / 4
        assert all([name for name, _ in hub.gets].count(name) == 1 for name in hub.files if name != BIG)
        assert service(cluster, namespace)["status"]["model"]["commit"] == COMMIT
        status = service(cluster, namespace)
        assert condition(status, "ModelReady") == "True"
        # Both workers mount what the one Job has fetched, and a pod that starts again asks nobody.
        downloads = len(hub.gets)
        for role in ("prefill", "decode"):
            (worker,) = cluster.pods(namespace, f"app.kubernetes.io/component={role},lanewise.io/service={NAME}")
            (mount,) = [m for m in worker["spec"]["containers"][0]["volumeMounts"] if m["name"] == "models"]
            assert mount["readOnly"]
        cluster.kubectl("delete", "pod", worker["metadata"]["name"], "-n", namespace, "--wait=false")
        address = f"{cluster.resolve(f'{NAME}-router.{namespace}.svc')}:{HTTP_PORT}"
        assert completed(address)
        assert len(hub.gets) == downloads
    finally:
        cluster.kubectl("delete", "llmservice", NAME, "-n", namespace, "--wait=true", "--timeout=60s")
        cluster.kubectl("delete", "persistentvolume", namespace, "--wait=false")


def completed(address: str) -> str:
    body = json.dumps({"model": "fable", "prompt": "Once upon a time", "max_tokens": 16}).encode()
    with urllib.request.urlopen(f"http://{address}/v1/completions", data=body, timeout=DEADLINE_S) as reply:
        return str(json.load(reply)["choices"][0]["text"])


def service(cluster: Cluster, namespace: str) -> dict[str, Any]:
    return cluster.get("llmservice", NAME, namespace)


def under_way(cluster: Cluster, namespace: str) -> str:
    """What ModelReady says once some of it is there; empty until then."""
    for part in service(cluster, namespace).get("status", {}).get("conditions", ()):
        if part["type"] == "ModelReady":
            found = re.search(r"([0-9.]+) of ([0-9.]+) GB", part.get("message", ""))
            if found and 0 < float(found[1]) < float(found[2]):
                return str(part["message"])
    return ""
