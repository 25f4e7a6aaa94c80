"""What rendering needs beside the resource itself, and what it yields.

Owns: the records passed between the plan modules. Must not: render, read a clock or a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lanewise.operator.names import labels, owner
from lanewise.spec import LLMService
from lanewise.spec_status import RuntimeStatus

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PlanContext:
    """The facts of the cluster and the operator that a rendering depends on."""

    namespace: str
    uid: str  # of the resource; empty where nothing is applied (`lanewise manifests`)
    runtime: RuntimeStatus
    router_cluster_role: str
    image_pull_policy: str = ""
    commit: str | None = None  # what spec.model.revision was resolved to; None until a download has finished
    monitors: frozenset[str] = frozenset()  # which of PodMonitor and ServiceMonitor this cluster knows


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that should exist for one service."""

    objects: tuple[Manifest, ...]
    deployments: Mapping[str, Manifest] = field(default_factory=dict)  # by role; empty while the model is downloaded
    config: Mapping[str, str] = field(default_factory=dict)  # by role, the text of its file


def child(
    service: LLMService, context: PlanContext, api: str, kind: str, name: str, component: str | None, **body: Any
) -> Manifest:
    """An object owned by the service, with the standard labels."""
    metadata: Manifest = {
        "name": name,
        "namespace": context.namespace,
        "labels": labels(service.metadata.name, component),
    }
    if context.uid:
        metadata["ownerReferences"] = owner(service.metadata.name, context.uid)
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **body}
