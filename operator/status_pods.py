"""What Deployments and pods say about a role, in few words. Pure.

Owns: counts, and the reason why pods are not ready (image, crash, quota, no node). Must not: write conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lanewise.operator import names

FAILING = frozenset(
    {"CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError"}
    | {"CreateContainerError", "RunContainerError", "ErrImageNeverPull"}
)


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """One role as the cluster has it. `trouble` is (reason, message) of the first pod that cannot run."""

    exists: bool = False
    desired: int = 0
    ready: int = 0
    draining: int = 0
    trouble: tuple[str, str] | None = None
    refused: str = ""  # why the cluster makes no pods: quota, admission


def role_facts(role: str, deployment: Mapping[str, Any] | None, pods: Sequence[Mapping[str, Any]]) -> RoleFacts:
    """From the Deployment of a role and the pods of the whole service."""
    mine = [pod for pod in pods if pod["metadata"].get("labels", {}).get(names.COMPONENT_LABEL) == role]
    draining = sum("deletionTimestamp" in pod["metadata"] for pod in mine)
    if deployment is None:
        return RoleFacts(draining=draining)
    status = deployment.get("status", {})
    return RoleFacts(
        exists=True,
        desired=int(deployment["spec"].get("replicas", 1)),
        ready=int(status.get("readyReplicas", 0)),
        draining=draining,
        trouble=_trouble(mine),
        refused=_refused(status),
    )


def _refused(status: Mapping[str, Any]) -> str:
    for condition in status.get("conditions", []):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return str(condition.get("message", "pods cannot be created"))
    return ""


def _trouble(pods: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The first pod, by name, that waits for something other than time."""
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        if "deletionTimestamp" in pod["metadata"]:
            continue
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for container in status.get("containerStatuses", []):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in FAILING:
                last = container.get("lastState", {}).get("terminated", {}).get("message", "")
                text = last or waiting.get("message", "")
                return str(waiting["reason"]), f"pod {name}: {waiting['reason']}: {_one_line(text)}"
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return "Unschedulable", f"pod {name}: {_one_line(condition.get('message', 'no node fits'))}"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]
