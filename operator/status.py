"""What a service's status says, from what was seen. Pure: time is an argument.

Owns: the conditions and their reasons, the numbers, and when a change of numbers is worth a write.
Must not: read or write anything. Conditions are observations of now, never steps of a procedure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from lanewise.operator import names
from lanewise.operator.fleet import NOTHING_KNOWN, FleetView
from lanewise.operator.plan_model import needs_download
from lanewise.operator.rollout import SETTLED, Phase, Rollout
from lanewise.operator.status_fleet import beneficial, kv_path, lanes
from lanewise.operator.status_pods import RoleFacts
from lanewise.spec import LLMService
from lanewise.spec_status import (
    CONDITION_TYPES,
    MAX_MESSAGE,
    Condition,
    ConditionType,
    LLMServiceStatus,
    ModelStatus,
    RoleStatus,
    RuntimeStatus,
)

Finding = tuple[str, str, str]
"""(status, reason, message) of a condition."""


@dataclass(frozen=True, slots=True)
class Download:
    """State of the model's download."""

    state: str = "Pending"  # Pending, Downloading, Failed or Complete
    message: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a status is made of."""

    generation: int
    namespace: str
    roles: Mapping[str, RoleFacts] = field(default_factory=dict)
    rollout: Rollout = SETTLED
    fleet: FleetView = NOTHING_KNOWN
    runtime: RuntimeStatus | None = None
    model: ModelStatus | None = None
    download: Download | None = None
    degraded: tuple[str, str] | None = None  # (reason, message) of what keeps the operator from its work
    rival: str = ""  # names two writers of one count


def build_status(service: LLMService, facts: Facts, previous: LLMServiceStatus, now: datetime) -> LLMServiceStatus:
    """The whole status; lastTransitionTime moves only where a condition's status does."""
    findings: dict[ConditionType, Finding] = {
        "ModelReady": _model(service, facts),
        **{kind: _role(service, facts, role) for kind, role in _ROLE_CONDITIONS.items()},
        "KVPathReady": kv_path(service, facts.fleet),
        "DisaggregationBeneficial": beneficial(service, facts.fleet),
        "Progressing": _progressing(service, facts),
        "Degraded": _degraded(facts),
    }
    findings["Ready"] = _ready(service, facts, findings)
    name = service.metadata.name
    return LLMServiceStatus(
        observed_generation=facts.generation,
        runtime=facts.runtime,
        model=facts.model,
        conditions=[_condition(kind, findings[kind], facts.generation, previous, now) for kind in CONDITION_TYPES],
        lanes=lanes(facts.fleet),
        url=f"http://{name}-router.{facts.namespace}.svc:{names.HTTP_PORT}",
        router=_counts(facts.roles.get("router", RoleFacts())),
        prefill=_counts(facts.roles.get("prefill", RoleFacts())),
        decode=_counts(facts.roles.get("decode", RoleFacts())),
    )


_ROLE_CONDITIONS: dict[ConditionType, str] = {
    "RouterReady": "router",
    "PrefillReady": "prefill",
    "DecodeReady": "decode",
}


def unreadable_status(generation: int, message: str, previous: LLMServiceStatus, now: datetime) -> LLMServiceStatus:
    """Of a stored resource that today's rules do not take: what runs stays as it is."""
    findings: dict[ConditionType, Finding] = {
        "Ready": ("Unknown", "InvalidSpec", message),
        "Progressing": ("False", "InvalidSpec", "nothing is changed until the resource is valid"),
        "Degraded": ("True", "InvalidSpec", message),
    }
    found: dict[str, Condition] = {item.type: item for item in previous.conditions}
    for kind, finding in findings.items():
        found[kind] = _condition(kind, finding, generation, previous, now)
    ordered = [found[kind] for kind in CONDITION_TYPES if kind in found]
    return previous.model_copy(update={"observed_generation": generation, "conditions": ordered})


def _condition(
    kind: ConditionType, finding: Finding, generation: int, previous: LLMServiceStatus, now: datetime
) -> Condition:
    status, reason, message = finding
    old = next((item for item in previous.conditions if item.type == kind), None)
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    if old is not None and old.status == status and old.last_transition_time:
        stamp = old.last_transition_time
    return Condition(
        type=kind,
        status=status,  # type: ignore[arg-type]
        reason=reason,
        message=message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "...",
        observed_generation=generation,
        last_transition_time=stamp,
    )


def _counts(facts: RoleFacts) -> RoleStatus:
    summary = f"{facts.ready}/{facts.desired}"
    return RoleStatus(desired=facts.desired, ready=facts.ready, draining=facts.draining, summary=summary)


# ---------------------------------------------------------------- conditions


def _model(service: LLMService, facts: Facts) -> Finding:
    uri = service.spec.model.uri
    if needs_download(service):
        found = facts.download or Download()
        if facts.model is not None and found.state == "Complete":
            return "True", "Downloaded", f"{uri} at commit {facts.model.commit}"
        if found.state == "Failed":
            return "False", "DownloadFailed", found.message
        return "False", "Downloading" if found.state == "Downloading" else "DownloadPending", found.message
    loaded = any(worker.ready for worker in facts.fleet.workers) or service.spec.model.name in facts.fleet.models
    if loaded or any(facts.roles.get(role, RoleFacts()).ready for role in names.WORKERS):
        return "True", "Loaded", f"{uri} is loaded"
    if facts.roles.get("decode", RoleFacts()).desired == 0:
        return "Unknown", "ScaledToZero", "no worker that could load it"
    return "False", "Loading", f"no worker has loaded {uri} yet"


def _role(service: LLMService, facts: Facts, role: str) -> Finding:
    found = facts.roles.get(role, RoleFacts())
    if not found.exists:
        waits = role in names.WORKERS and needs_download(service) and facts.model is None
        return "False", "WaitingForModel" if waits else "NotCreated", "its Deployment does not exist yet"
    draining = f", {found.draining} draining{_eta(facts.fleet, role)}" if found.draining else ""
    counts = f"{found.ready} of {found.desired} ready{draining}"
    if found.desired == 0:
        return (
            "True",
            "Combined" if role == "prefill" and service.spec.prefill.replicas == 0 else "ScaledToZero",
            counts,
        )
    if found.ready >= found.desired:
        return "True", "AllReady", counts
    if found.refused:
        return _bool(found.ready), "PodsRefused", f"{counts}; {found.refused}"
    if found.trouble is not None:
        return _bool(found.ready), found.trouble[0], f"{counts}; {found.trouble[1]}"
    return _bool(found.ready), "SomeReady" if found.ready else "NotReady", counts


def _bool(ready: int) -> str:
    return "True" if ready else "False"


def _eta(fleet: FleetView, role: str) -> str:
    left = [worker.drain_eta_s for worker in fleet.workers if worker.role == role and worker.draining]
    return f" (about {_round(max(left))} s left)" if left else ""


def _round(value: float) -> str:
    """Two digits are enough for a person, and change rarely."""
    return f"{float(f'{value:.2g}'):g}"


def _progressing(service: LLMService, facts: Facts) -> Finding:
    if service.spec.paused:
        return "False", "Paused", "spec.paused is true: the operator changes nothing"
    if facts.degraded is not None:
        return "False", "Blocked", facts.degraded[1]
    if facts.rollout.stalled:
        return "False", "RolloutStalled", facts.rollout.stalled
    if needs_download(service) and facts.model is None:
        return "True", "Downloading", "workers start when the model is there"
    words = {
        Phase.ROLLING: "pods are being replaced or started",
        Phase.DECODE_FIRST: "the KV fingerprint changes: decode workers are replaced first",
        Phase.PREFILL_NEXT: "decode workers are replaced, prefill workers follow",
    }
    phase = facts.rollout.phase
    if phase is Phase.SETTLED:
        return "False", "Complete", "every pod is as the resource asks"
    return "True", phase.value, words[phase]


def _degraded(facts: Facts) -> Finding:
    if facts.degraded is not None:
        return "True", *facts.degraded
    if facts.rollout.stalled:
        return "True", "RolloutStalled", facts.rollout.stalled
    if facts.rival:
        return "True", "Conflict", facts.rival
    if facts.download is not None and facts.download.state == "Failed":
        return "True", "DownloadFailed", facts.download.message
    for role in names.ROLES:
        found = facts.roles.get(role, RoleFacts())
        if found.refused:
            reason = "QuotaExceeded" if "exceeded quota" in found.refused else "PodsRefused"
            return "True", reason, f"{role}: {found.refused}"
        if found.trouble is not None and found.trouble[0] != "Unschedulable":
            return "True", "PodsFailing", f"{role}: {found.trouble[1]}"
    return "False", "AsExpected", ""


def _ready(service: LLMService, facts: Facts, findings: Mapping[ConditionType, Finding]) -> Finding:
    """Whether a request that comes now is served."""
    needed: list[ConditionType] = ["RouterReady", "DecodeReady"]
    if service.spec.disaggregation == "Always":
        needed.append("PrefillReady")
    for kind in needed:
        status, reason, message = findings[kind]
        if status != "True":
            if findings["Degraded"][0] == "True":
                return "False", findings["Degraded"][1], findings["Degraded"][2]
            return "False", reason, f"{_ROLE_CONDITIONS[kind]}: {message}"
    if facts.roles["decode"].desired == 0:
        return "True", "ScaledToZero", "requests wait for a worker to start"
    return "True", "Serving", f"serving {service.spec.model.name}"
