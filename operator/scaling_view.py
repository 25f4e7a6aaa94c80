"""From what the cluster and the routers say to one observation of a service, and to who may scale it.

Owns: counting pods, sums of routers, conflicts between writers. Pure. Must not: call anything or decide counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from statistics import median
from typing import Any

from lanewise.operator import names
from lanewise.operator.observed import Known
from lanewise.operator.status_pods import FAILING
from lanewise.policy.cost import CostModel, usual_cost
from lanewise.policy.scaling_types import Demand, Observation, RoleView

Manifest = Mapping[str, Any]

START_S = 60.0  # until pods have shown how long they take
START_BOUNDS_S = (5.0, 1800.0)
CORRECTION_BOUNDS = (0.5, 2.0)
GPU_SUFFIX = "/gpu"  # nvidia.com/gpu, amd.com/gpu
FIELDS = tuple(item.name for item in fields(Demand) if item.name != "seconds")


@dataclass(slots=True)
class Memory:
    """What is kept of a service between looks, beside the policy's own state."""

    totals: dict[str, tuple[float, Demand]] = field(default_factory=dict)  # of each router, when it last answered
    waited: dict[str, int] = field(default_factory=dict)  # requests that ever waited for workers, of each router
    asked_at: float | None = None
    costs: dict[str, CostModel] = field(default_factory=dict)  # by role, while no worker is up that knows it
    watts: dict[str, float] = field(default_factory=dict)  # of one GPU, by role, likewise
    capacity: int = 0


@dataclass(frozen=True, slots=True)
class Conflict:
    """Why a policy may not write: another writer has the counts."""

    message: str


# ---------------------------------------------------------------- who writes


def conflict(
    policy: Manifest, policies: Sequence[Manifest], hpas: Sequence[Manifest], service: Manifest
) -> Conflict | None:
    """None where this policy is the one writer of both roles."""
    name, target = policy["metadata"]["name"], policy["spec"]["targetRef"]["name"]
    rivals = [item for item in policies if item["spec"]["targetRef"]["name"] == target]
    first = oldest(rivals)["metadata"]["name"]
    if first != name:
        return Conflict(f"ScalingPolicy {first} is older than {name} and scales LLMService {target}")
    for role in names.WORKERS:
        replicas = service["spec"].get(role, {}).get("replicas")
        if replicas is not None:
            return Conflict(
                f"LLMService {target} sets spec.{role}.replicas ({replicas}); ScalingPolicy {name} scales it only when "
                "replicas of both roles are omitted"
            )
    found = scaler(hpas, {f"{target}-{role}" for role in names.WORKERS})
    if found is None:
        return None
    hpa, deployment = found
    return Conflict(f"{hpa} and ScalingPolicy {name} both scale Deployment {deployment}; remove one")


def scaler(hpas: Sequence[Manifest], deployments: Collection[str]) -> tuple[str, str] | None:
    """An HPA that scales one of these Deployments, in words, and which."""
    for hpa in hpas:
        ref = hpa["spec"].get("scaleTargetRef", {})
        if ref.get("kind") == "Deployment" and ref.get("name") in deployments:
            return f"HorizontalPodAutoscaler {hpa['metadata']['name']}{_maker(hpa)}", str(ref["name"])
    return None


def oldest(policies: Sequence[Manifest]) -> Manifest:
    """The one that scales, of those with one target."""
    return min(policies, key=_age)


def _maker(hpa: Manifest) -> str:
    """Who made it, where somebody did: KEDA's would come back until its ScaledObject is gone."""
    owners = hpa["metadata"].get("ownerReferences", ())
    return next((f" (of {owner['kind']} {owner['name']})" for owner in owners if owner.get("controller")), "")


def _age(policy: Manifest) -> tuple[str, str]:
    return str(policy["metadata"].get("creationTimestamp", "")), str(policy["metadata"]["name"])


# ---------------------------------------------------------------- what is there


def observe(
    known: Known, service: str, replies: Sequence[Any], silent: int, memory: Memory, at_s: float, now: datetime
) -> Observation:
    """One observation; `memory` is brought up to date. `at_s`: seconds of UTC. `now`: the same, aware.

    `silent`: routers that have clients and did not answer.
    """
    demand = _demand(replies, silent, memory, at_s)
    workers = _newest(replies)
    pods = known.of("Pod")
    roles = {}
    for role in names.WORKERS:
        mine = [item for item in workers if item.description.role == role]
        stats = [item.stats for item in mine]
        _learn(role, stats, memory)
        if power := max((float(item.description.power_watts) for item in mine), default=0.0):
            memory.watts[role] = power
        deployment = known.child("Deployment", f"{service}-{role}")
        its_pods = [pod for pod in pods if pod["metadata"].get("labels", {}).get(names.COMPONENT_LABEL) == role]
        roles[role] = _role(role, deployment, its_pods, stats, memory, now)
    prefill = [item.stats for item in workers if item.description.role == "prefill"]
    decode = [item.stats for item in workers if item.description.role == "decode"]
    return Observation(
        at_s,
        demand,
        roles["prefill"],
        roles["decode"],
        queued_tokens=float(sum(stats.queued_tokens for stats in prefill)),
        running=float(sum(stats.running_requests for stats in decode)),
        held=_held(replies, memory),
        start_s=start_s(pods),
    )


def _held(replies: Sequence[Any], memory: Memory) -> int:
    """Requests that wait for workers, or did since the last look: one that waited briefly must wake a service, too."""
    held = 0
    for reply in replies:
        before = memory.waited.get(reply.router, reply.held_total)
        memory.waited[reply.router] = reply.held_total
        held += max(reply.held, reply.held_total - before)
    return held


def _demand(replies: Sequence[Any], silent: int, memory: Memory, at_s: float) -> Demand:
    """What came since the last look. Where some routers did not answer, those that did stand for them.

    Of a router that was silent for a while only this look's share counts: others have stood for the rest.
    """
    seconds = at_s - memory.asked_at if memory.asked_at is not None else 0.0
    if not replies:
        return Demand()
    found = Demand()
    for reply in replies:
        total = Demand(**{name: getattr(reply.demand, name) for name in FIELDS})
        before = memory.totals.get(reply.router)
        memory.totals[reply.router] = at_s, total
        if before is not None and at_s > before[0]:
            found += _times(total.since(before[1], 0.0), min(max(seconds, 0.0) / (at_s - before[0]), 1.0))
    present = {reply.router for reply in replies}
    if not silent:
        memory.totals = {router: total for router, total in memory.totals.items() if router in present}
        memory.waited = {router: count for router, count in memory.waited.items() if router in present}
    memory.asked_at = at_s
    return replace(_times(found, 1 + silent / len(replies)), seconds=max(seconds, 0.0))


def _times(demand: Demand, factor: float) -> Demand:
    return Demand(**{name: getattr(demand, name) * factor for name in FIELDS})


def _newest(replies: Sequence[Any]) -> list[Any]:
    """FleetWorker by incarnation, the newest word of each."""
    newest: dict[str, Any] = {}
    for item in (worker for reply in replies for worker in reply.workers):
        known = newest.get(item.description.incarnation)
        if known is None or item.stats_age_s < known.stats_age_s:
            newest[item.description.incarnation] = item
    return [newest[key] for key in sorted(newest)]


def _learn(role: str, stats: Sequence[Any], memory: Memory) -> None:
    costs = [(CostModel.from_mapping(dict(item.cost)), int(item.cost_batches)) for item in stats if item.cost]
    if found := usual_cost(costs):
        memory.costs[role] = found
    elif costs:
        memory.costs.setdefault(role, costs[0][0])
    if role == "decode":
        memory.capacity = max((int(item.kv_capacity_tokens) for item in stats), default=memory.capacity)


def _role(
    role: str,
    deployment: Manifest | None,
    pods: Sequence[Manifest],
    stats: Sequence[Any],
    memory: Memory,
    now: datetime,
) -> RoleView:
    desired = int(deployment["spec"].get("replicas", 1)) if deployment is not None else 0
    alive = [pod for pod in pods if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")]
    staying = [pod for pod in alive if "deletionTimestamp" not in pod["metadata"]]
    pending, pending_s = _pending(staying, deployment, desired, now)
    cost = memory.costs.get(role) or memory.costs.get("decode") or CostModel()
    gpus, one_gpu = gpus_of(deployment), memory.watts.get(role) or max(memory.watts.values(), default=0.0)
    return RoleView(
        desired=desired,
        ready=sum(_ready_at(pod) is not None for pod in staying),
        pending=pending,
        pending_s=pending_s,
        # What is there beyond what is asked for still holds its GPUs, too.
        terminating=len(alive) - len(staying) + max(len(staying) - desired, 0),
        cost=cost,
        kv_capacity_tokens=memory.capacity,
        gpus=gpus,
        watts=one_gpu * max(gpus, 1),
        correction=_correction(stats, cost) if role == "decode" else 1.0,
    )


def _pending(
    staying: Sequence[Manifest], deployment: Manifest | None, desired: int, now: datetime
) -> tuple[int, float]:
    """(pods that the count is short of because they cannot start or cannot even be made, seconds of the oldest).

    A pod too many, as a rollout makes them, keeps no role below its count, whatever becomes of it.
    """
    stuck = [pod for pod in staying if _cannot_start(pod)]
    since = [_time(pod["metadata"]["creationTimestamp"]) for pod in stuck]
    missing = max(desired - len(staying), 0)
    conditions = deployment.get("status", {}).get("conditions", []) if deployment is not None else []
    refused = [c for c in conditions if c["type"] == "ReplicaFailure" and c["status"] == "True"]
    since += [_time(c["lastTransitionTime"]) for c in refused if missing]
    short = len(stuck) + (missing if refused else 0)
    pending = min(short, max(desired - (len(staying) - len(stuck)), 0))
    return pending, (now - min(since)).total_seconds() if pending else 0.0


def _cannot_start(pod: Manifest) -> bool:
    """No node has room for it, or its image does not come. A pod whose containers are being made is on its way."""
    status = pod.get("status", {})
    if status.get("phase", "Pending") != "Pending":
        return False
    scheduled = any(c["type"] == "PodScheduled" and c["status"] == "True" for c in status.get("conditions", []))
    waiting = (item.get("state", {}).get("waiting", {}) for item in status.get("containerStatuses", []))
    return not scheduled or any(item.get("reason") in FAILING for item in waiting)


def gpus_of(deployment: Manifest | None) -> int:
    """GPUs that one pod of this Deployment asks for."""
    if deployment is None:
        return 0
    containers = deployment["spec"].get("template", {}).get("spec", {}).get("containers", [])
    limits = (container.get("resources", {}).get("limits", {}) for container in containers)
    return sum(int(count) for limit in limits for name, count in limit.items() if name.endswith(GPU_SUFFIX))


def _correction(stats: Sequence[Any], cost: CostModel) -> float:
    """Measured over expected step time of the decode workers that are at work."""
    ratios = [
        item.decode_step_s / cost.decode(item.running_requests, item.running_context_tokens)
        for item in stats
        if item.running_requests and item.decode_step_s > 0
    ]
    low, high = CORRECTION_BOUNDS
    return min(max(median(ratios), low), high) if ratios else 1.0


def start_s(pods: Sequence[Manifest]) -> float:
    """From a pod's creation to its readiness, as the workers that run have shown it (the slower half of them)."""
    took = []
    for pod in pods:
        ready = _ready_at(pod)
        if ready is not None and pod["metadata"].get("labels", {}).get(names.COMPONENT_LABEL) in names.WORKERS:
            took.append((ready - _time(pod["metadata"]["creationTimestamp"])).total_seconds())
    low, high = START_BOUNDS_S
    return min(max(median(took), low), high) if took else START_S


def _ready_at(pod: Manifest) -> datetime | None:
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "Ready" and condition["status"] == "True":
            return _time(condition.get("lastTransitionTime") or pod["metadata"]["creationTimestamp"])
    return None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
