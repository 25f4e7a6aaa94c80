"""Who else writes a count that the service sets itself.

Owns: recognising it, and saying so. Must not: write, or give in: a count in the resource is the operator's to repair,
so an autoscaler beside it moves pods to and fro until somebody removes one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lanewise.operator import names
from lanewise.operator.cluster import Cluster
from lanewise.operator.scaling_view import scaler

Manifest = dict[str, Any]


def set_counts(service: Manifest) -> dict[str, int]:
    """By name of the Deployment, the counts that the resource sets."""
    spec, name = service["spec"], service["metadata"]["name"]
    found = {f"{name}-{role}": spec.get(role, {}).get("replicas") for role in names.ROLES}
    return {deployment: count for deployment, count in found.items() if count is not None}


def drifted(service: Manifest, live: Mapping[str, Manifest | None]) -> bool:
    """Whether somebody else has written one of these counts."""
    counts = set_counts(service)
    deployments = [item for item in live.values() if item is not None]
    return any(
        item["spec"].get("replicas") != counts[name]
        for item in deployments
        if (name := item["metadata"]["name"]) in counts
    )


def rival(service: Manifest, hpas: Sequence[Manifest]) -> str:
    """Names both writers of one count; empty where there is one alone."""
    counts, name = set_counts(service), service["metadata"]["name"]
    found = scaler(hpas, counts)
    if found is None:
        return ""
    hpa, deployment = found
    field = f"spec.{deployment.removeprefix(f'{name}-')}.replicas ({counts[deployment]})"
    both = f"{hpa} scales Deployment {deployment}, and LLMService {name} sets {field}"
    return f"{both}; omit the count or remove the autoscaler"


async def seen(
    cluster: Cluster, namespace: str, service: Manifest, live: Mapping[str, Manifest | None], before: str
) -> str:
    """As `rival`. Asked before a drift is repaired and, once there was one (`before`), until nobody else writes:
    without either no autoscaler has moved anything."""
    if not before and not drifted(service, live):
        return ""
    return rival(service, await cluster.list("HorizontalPodAutoscaler", namespace))
