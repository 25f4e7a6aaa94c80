"""The kinds of objects the operator reads or writes: where the API has them, and which are watched.

Owns: the table. Must not: talk to a cluster. The chart's roles have to permit exactly what is used of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from lanewise.operator.plan_network import MONITORING_API
from lanewise.spec import API_VERSION


@dataclass(frozen=True, slots=True)
class Kind:
    api: str  # group/version, or v1
    plural: str
    watched: bool = True  # else only listed when a service is looked at anew

    @property
    def group(self) -> str:
        return self.api.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.api.rpartition("/")[2]


CHILDREN: dict[str, Kind] = {
    "Deployment": Kind("apps/v1", "deployments"),
    "Service": Kind("v1", "services"),
    "ServiceAccount": Kind("v1", "serviceaccounts"),
    "ConfigMap": Kind("v1", "configmaps"),
    "RoleBinding": Kind("rbac.authorization.k8s.io/v1", "rolebindings"),
    "PodDisruptionBudget": Kind("policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": Kind("networking.k8s.io/v1", "networkpolicies"),
    "PersistentVolumeClaim": Kind("v1", "persistentvolumeclaims"),
    "Job": Kind("batch/v1", "jobs"),
    "Pod": Kind("v1", "pods"),
    "ControllerRevision": Kind("apps/v1", "controllerrevisions", watched=False),
    "PodMonitor": Kind(MONITORING_API, "podmonitors", watched=False),
    "ServiceMonitor": Kind(MONITORING_API, "servicemonitors", watched=False),
}
OPTIONAL = ("PodMonitor", "ServiceMonitor")
"""Kinds that a cluster need not have."""

KINDS: dict[str, Kind] = {
    **CHILDREN,
    "LLMService": Kind(API_VERSION, "llmservices"),
    "ScalingPolicy": Kind(API_VERSION, "scalingpolicies"),
    "HorizontalPodAutoscaler": Kind("autoscaling/v2", "horizontalpodautoscalers"),
    "Lease": Kind("coordination.k8s.io/v1", "leases"),
    "Event": Kind("v1", "events"),
    "Scale": Kind("autoscaling/v1", "scale"),
}
