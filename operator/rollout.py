"""In which order the worker roles take up a change, and where their old templates are kept. Pure.

Owns: the rule of docs/design.md §8: workers pair only within one fingerprint, so a change that alters it goes to
decode first (a decode worker without a partner prefills for itself) and to prefill when decode is complete.
Must not: write anything. Within a role the Deployment's own strategy rolls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lanewise.operator import names
from lanewise.operator.plan_config import short_hash
from lanewise.operator.plan_types import Manifest

KEPT_REVISIONS = 5
STALLED = "ProgressDeadlineExceeded"


class Phase(StrEnum):
    SETTLED = "Settled"
    ROLLING = "Rolling"  # both roles by themselves: the fingerprint stays
    DECODE_FIRST = "RollingDecode"
    PREFILL_NEXT = "RollingPrefill"


@dataclass(frozen=True, slots=True)
class Rollout:
    """Where a change stands. `hold`: roles that stay at what they run now."""

    phase: Phase
    hold: frozenset[str] = frozenset()
    stalled: str = ""  # in words, naming the Deployment


SETTLED = Rollout(Phase.SETTLED)


def decide(target: str | None, live: Mapping[str, Manifest | None]) -> Rollout:
    """From the fingerprint that is wanted (None: the model is not there yet) and the Deployments by role."""
    workers = [item for role in names.WORKERS if (item := live.get(role)) is not None]
    stalled = "; ".join(filter(None, map(_stall, workers)))
    prefill, decode = live.get("prefill"), live.get("decode")
    if prefill is None or decode is None or target is None:
        settled = target is not None and all(map(complete, workers))
        return Rollout(Phase.SETTLED if settled else Phase.ROLLING, stalled=stalled)
    decode_done = fingerprint(decode) == target and complete(decode)
    if fingerprint(prefill) == target:
        # What differs, if anything, rolls in both roles at once; or prefill has been let go and follows decode.
        settled = decode_done and complete(prefill)
        return Rollout(Phase.SETTLED if settled else Phase.ROLLING, stalled=stalled)
    if decode_done:
        return Rollout(Phase.PREFILL_NEXT, stalled=stalled)
    return Rollout(Phase.DECODE_FIRST, frozenset({"prefill"}), stalled)


def fingerprint(deployment: Mapping[str, Any]) -> str:
    """What a Deployment's pods may exchange KV by; empty where it is not one of ours."""
    annotations = deployment["spec"]["template"].get("metadata", {}).get("annotations") or {}
    return str(annotations.get(names.FINGERPRINT, ""))


def complete(deployment: Mapping[str, Any]) -> bool:
    """Every pod is of the newest template and available, and the controller has seen that template."""
    status, metadata = deployment.get("status", {}), deployment["metadata"]
    wanted = deployment["spec"].get("replicas", 1)
    return bool(
        status.get("observedGeneration", 0) >= metadata.get("generation", 1)
        and status.get("updatedReplicas", 0) >= wanted
        and status.get("replicas", 0) <= status.get("updatedReplicas", 0)
        and status.get("availableReplicas", 0) >= wanted
    )


def _stall(deployment: Mapping[str, Any]) -> str:
    for condition in deployment.get("status", {}).get("conditions", []):
        if condition["type"] == "Progressing" and condition.get("reason") == STALLED:
            return f"Deployment {deployment['metadata']['name']}: {condition.get('message', STALLED)}"
    return ""


# ---------------------------------------------------------------- what a held role goes on with


def revision_of(deployment: Manifest, config: str, numbers: Sequence[int]) -> Manifest:
    """The ControllerRevision that keeps a role's template and configuration, as the newest one."""
    metadata = deployment["metadata"]
    role = metadata["labels"][names.COMPONENT_LABEL]
    data = {"deployment": _without_replicas(deployment), "config": config}
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": f"{metadata['name']}-{short_hash(data)}",
            "namespace": metadata["namespace"],
            "labels": names.labels(metadata["labels"][names.SERVICE_LABEL], role),
            "annotations": {names.FINGERPRINT: fingerprint(deployment)},
            "ownerReferences": metadata.get("ownerReferences", []),
        },
        "data": data,
        "revision": max(numbers, default=0) + 1,
    }


def newest(revisions: Sequence[Manifest], role: str, print_: str | None = None) -> Manifest | None:
    """The last revision of a role, or the last one with a fingerprint."""
    found = [
        item
        for item in of_role(revisions, role)
        if print_ is None or item["metadata"].get("annotations", {}).get(names.FINGERPRINT) == print_
    ]
    return max(found, key=lambda item: int(item["revision"]), default=None)


def surplus(revisions: Sequence[Manifest], role: str) -> list[Manifest]:
    """Revisions beyond those kept, oldest first."""
    ordered = sorted(of_role(revisions, role), key=lambda item: int(item["revision"]))
    return ordered[: max(0, len(ordered) - KEPT_REVISIONS)]


def of_role(revisions: Sequence[Manifest], role: str) -> list[Manifest]:
    return [item for item in revisions if item["metadata"].get("labels", {}).get(names.COMPONENT_LABEL) == role]


def held(kept: Manifest, replicas: int | None) -> Manifest:
    """The old Deployment with today's count (None: somebody else's): scaling goes on while a template is held."""
    made = _without_replicas(kept)
    return made if replicas is None else {**made, "spec": {**made["spec"], "replicas": replicas}}


def _without_replicas(deployment: Manifest) -> Manifest:
    spec = {name: value for name, value in deployment["spec"].items() if name != "replicas"}
    return {**deployment, "spec": spec}
