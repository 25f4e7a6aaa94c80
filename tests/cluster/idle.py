"""Services whose pods never run, for tests that are about objects: they cost the machine nothing.

Owns: such a resource. Must not: be used where a pod has to be ready.
"""

from __future__ import annotations

from typing import Any

from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.tools import wait_for

NOWHERE = {"nodeSelector": {"test/nowhere": "true"}}


def idle_service(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    """An LLMService with one pod per role, all Pending; `spec` is merged over it role by role."""
    roles: dict[str, Any] = {
        role: {"replicas": 1, "podTemplate": {"spec": NOWHERE}} for role in ("prefill", "decode", "router")
    }
    for key, value in spec.items():
        roles[key] = {**roles[key], **value} if key in roles else value
    return {
        "apiVersion": "lanewise.io/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"uri": "builtin://fable"}, **roles},
    }


def wait_observed(cluster: Cluster, name: str, namespace: str, deadline_s: float = 40.0) -> dict[str, Any]:
    """The resource, once the operator has seen what it says now."""

    def seen() -> dict[str, Any] | None:
        service = cluster.get("llmservice", name, namespace)
        same = service.get("status", {}).get("observedGeneration") == service["metadata"]["generation"]
        return service if same else None

    return wait_for(seen, f"the operator to see {name}", deadline_s, poll_s=0.2)
