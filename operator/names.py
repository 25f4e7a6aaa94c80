"""Names, labels and annotations of everything the operator makes.

Owns: the words that tie children to their service; other parts find them by these. Must not: build objects.
"""

from __future__ import annotations

from typing import Any

from lanewise.spec import API_VERSION

GROUP, VERSION = API_VERSION.split("/")
PREFIX = GROUP
MANAGER = "lanewise-operator"
HANDOFF_MANAGER = "lanewise-handoff"

SERVICE_LABEL = f"{PREFIX}/service"
COMPONENT_LABEL = "app.kubernetes.io/component"
MANAGED_BY = {"app.kubernetes.io/managed-by": MANAGER}
CONFIG_HASH = f"{PREFIX}/config-hash"
FINGERPRINT = f"{PREFIX}/fingerprint"
APPLIED_HASH = f"{PREFIX}/applied-hash"

ROLES = ("router", "prefill", "decode")
WORKERS = ("prefill", "decode")

HTTP_PORT, GRPC_PORT = 8000, 50051
WORKER_PORT, KV_PORT, METRICS_PORT, PROGRESS_PORT = 50061, 50071, 8080, 8080
HEALTH_PORT, KV_DATA_PORT = 50062, 50072  # probes show no certificate where one is asked for; KV beside its control


def labels(service: str, component: str | None = None) -> dict[str, str]:
    """Labels of a child; without a component for what all roles share."""
    found = {
        "app.kubernetes.io/name": "lanewise",
        "app.kubernetes.io/instance": service,
        **MANAGED_BY,
        SERVICE_LABEL: service,
    }
    return found if component is None else {**found, COMPONENT_LABEL: component}


def selector(service: str, component: str) -> dict[str, str]:
    """What a Deployment selects by. It can never change: selectors are immutable."""
    return {SERVICE_LABEL: service, COMPONENT_LABEL: component}


def owner(name: str, uid: str) -> list[dict[str, Any]]:
    """The service as controller: garbage collection deletes its children, no finalizer is needed."""
    reference = {"apiVersion": API_VERSION, "kind": "LLMService", "name": name, "uid": uid}
    return [{**reference, "controller": True, "blockOwnerDeletion": False}]
