"""Pods that nobody runs, by kwok, where the number of objects is the question.

Owns: one fake node and the program that answers for it.
Must not: touch the real node: a label and a taint keep them apart.
"""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.kube import gobuild
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for

NODE = "fake"
LABEL = {"type": "kwok"}
TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
FAKE: dict[str, Any] = {"nodeSelector": LABEL, "tolerations": [TAINT]}
"""Pod spec fields that send a pod to the fake node."""
MAX_PODS = "2000"
LEASE_S = 40


def fake_node(cluster: Cluster) -> None:
    """A node on which every pod is Ready at once and costs nothing; made once per cluster."""
    if cluster.find("node", NODE):
        return
    found = gobuild.data_dir("kwok").rglob("*.yaml")
    stages = sorted(str(path) for path in found if path.stem != "kustomization" and path.parent.name != "testdata")
    slot = cluster.slot
    cluster.start(
        [
            *("kwok", f"--kubeconfig={slot.kubeconfig}", "--manage-nodes-with-label-selector=type=kwok"),
            f"--node-lease-duration-seconds={LEASE_S}",
            *(f"--cidr={slot.fake_pod_cidr}", f"--node-ip={slot.node_ip}", f"--node-name={NODE}"),
            *(f"--config={stage}" for stage in stages),
        ]
    )
    room = {"cpu": "10000", "memory": "10000Gi", "pods": MAX_PODS}
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE, "labels": {**LABEL, "kubernetes.io/hostname": NODE}},
        "spec": {"taints": [TAINT]},
    }
    cluster.apply(node)
    status = {"allocatable": room, "capacity": room}
    cluster.kubectl("patch", "node", NODE, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    wait_for(lambda: condition(cluster.get("node", NODE), "Ready") == "True", "the fake node", 60)
