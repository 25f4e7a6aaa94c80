"""What a ScalingPolicy sees and says: pods counted, routers summed, conflicts named, statuses. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lanewise.errors import ConfigError
from lanewise.operator.observed import Known
from lanewise.operator.scaling_status import active, inactive, worth_writing
from lanewise.operator.scaling_view import Memory, conflict, observe
from lanewise.policy.scaling import decide
from lanewise.policy.scaling_types import Demand, State
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.scaling_rules import floors_at, rules_of
from lanewise.spec_scaling import ScalingPolicySpec, ScalingPolicyStatus

NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)  # a Monday


def policy(name: str = "chat", target: str = "chat", created: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    return {"metadata": {"name": name, "creationTimestamp": created}, "spec": {"targetRef": {"name": target}}}


def service(**roles: Any) -> dict[str, Any]:
    return {"metadata": {"name": "chat"}, "spec": {"prefill": {}, "decode": {}, **roles}}


def hpa(name: str, deployment: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"scaleTargetRef": {"kind": "Deployment", "name": deployment}}}


def deployment(role: str, replicas: int, gpus: int = 1) -> dict[str, Any]:
    resources = {"limits": {"nvidia.com/gpu": str(gpus), "cpu": "4"}}
    spec = {"containers": [{"name": "worker", "resources": resources}]}
    return {"metadata": {"name": f"chat-{role}"}, "spec": {"replicas": replicas, "template": {"spec": spec}}}


def pod(
    role: str, name: str, *, phase: str = "Running", ready: bool = True, age_s: float = 100, gone: bool = False
) -> Any:
    created = NOW - timedelta(seconds=age_s)
    metadata: dict[str, Any] = {
        "name": name,
        "labels": {"app.kubernetes.io/component": role},
        "creationTimestamp": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if gone:
        metadata["deletionTimestamp"] = "2026-03-02T09:00:00Z"
    since = (created + timedelta(seconds=20)).strftime("%Y-%m-%dT%H:%M:%SZ")
    conditions = [{"type": "Ready", "status": str(ready), "lastTransitionTime": since}]
    return {"metadata": metadata, "status": {"phase": phase, "conditions": conditions}}


def known(*pods: Any, prefill: int = 1, decode: int = 1) -> Known:
    found = Known(service=service())
    for item in (deployment("prefill", prefill), deployment("decode", decode, gpus=2)):
        found.children["Deployment", item["metadata"]["name"]] = item
    for item in pods:
        found.children["Pod", item["metadata"]["name"]] = item
    return found


def reply(router: str, requests: float = 0, held: int = 0, workers: tuple[Any, ...] = ()) -> pb.FleetReply:
    demand = pb.Demand(requests=requests, uncached_tokens=100 * requests)
    return pb.FleetReply(router=router, held=held, demand=demand, workers=workers)


def worker(role: str, incarnation: str, age_s: float = 0.0, watts: int = 0, **stats: Any) -> pb.FleetWorker:
    description = pb.Description(role=role, incarnation=incarnation, power_watts=watts)
    return pb.FleetWorker(description=description, stats=pb.Stats(**stats), stats_age_s=age_s, ready=True)


def look(found: Known, replies: list[pb.FleetReply], memory: Memory, at_s: float = 100.0, asked: int = 0) -> Any:
    return observe(found, "chat", replies, asked or len(replies), memory, at_s, NOW)


# ---------------------------------------------------------------- who writes


def test_the_oldest_policy_wins_and_the_others_name_it() -> None:
    old, young = policy("old"), policy("young", created="2026-02-01T00:00:00Z")
    assert conflict(old, [young, old], [], service()) is None
    found = conflict(young, [young, old], [], service())
    assert found is not None
    assert found.message == "ScalingPolicy old is older and scales LLMService chat"
    assert conflict(policy("other", "else"), [old, policy("other", "else")], [], service()) is None


def test_an_hpa_on_a_role_is_a_conflict_that_names_both() -> None:
    found = conflict(policy(), [policy()], [hpa("fast", "unrelated"), hpa("mine", "chat-decode")], service())
    assert found is not None
    assert "HorizontalPodAutoscaler mine and ScalingPolicy chat both scale Deployment chat-decode" in found.message


def test_the_hpa_of_a_scaled_object_is_named_with_its_maker() -> None:
    made = hpa("keda-hpa-mine", "chat-decode")
    made["metadata"]["ownerReferences"] = [{"kind": "ScaledObject", "name": "mine", "controller": True}]
    found = conflict(policy(), [policy()], [made], service())
    assert found is not None
    assert "HorizontalPodAutoscaler keda-hpa-mine (of ScaledObject mine) and ScalingPolicy chat both" in found.message


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_replicas_in_the_service_keep_the_policy_out(role: str) -> None:
    found = conflict(policy(), [policy()], [], service(**{role: {"replicas": 0}}))
    assert found is not None
    assert f"spec.{role}.replicas (0)" in found.message


# ---------------------------------------------------------------- what is seen


def test_the_power_of_a_worker_is_what_its_gpu_may_draw_and_is_remembered() -> None:
    memory = Memory()
    workers = (worker("prefill", "p1", watts=700), worker("prefill", "p2", watts=600), worker("decode", "d1"))
    seen = look(known(), [reply("a", workers=workers)], memory)
    assert (seen.prefill.watts, seen.decode.watts) == (700.0, 0.0)  # the hungriest stands for its role
    gone = look(known(), [reply("a")], memory, 115.0)
    assert gone.prefill.watts == 700.0  # scaled to zero: the budget still knows what a worker takes


def test_demand_is_the_difference_of_totals_over_all_routers() -> None:
    memory = Memory()
    first = look(known(), [reply("a", 1000), reply("b", 500)], memory, 100.0)
    assert first.demand.seconds == 0  # what was before the first look came in no known time
    second = look(known(), [reply("a", 1030), reply("b", 510, held=3)], memory, 115.0)
    assert (second.demand.seconds, second.demand.requests, second.held) == (15.0, 40, 3)
    assert second.demand.uncached_tokens == 4000
    restarted = look(known(), [reply("a", 1030), reply("c", 7)], memory, 130.0)
    assert restarted.demand.requests == 0  # a router seen for the first time: its total came in no known time
    partly = look(known(), [reply("a", 1050)], memory, 145.0, asked=2)
    assert partly.demand.requests == 40  # one of two routers answered: it stands for both
    assert look(known(), [], memory, 160.0, asked=2).demand.seconds == 0


def test_a_router_that_restarts_in_place_counts_from_zero() -> None:
    assert Demand(requests=5).since(Demand(requests=100), 15.0).requests == 5


def test_pods_are_counted_by_what_they_hold() -> None:
    found = known(
        pod("prefill", "p0"),
        pod("prefill", "p1", phase="Pending", ready=False, age_s=90),
        pod("prefill", "p2", phase="Pending", ready=False, age_s=30),
        pod("decode", "d0"),
        pod("decode", "d1", gone=True),
        pod("decode", "d2", phase="Succeeded"),
        prefill=3,
    )
    seen = look(found, [reply("a")], Memory())
    assert (seen.prefill.desired, seen.prefill.ready, seen.prefill.pending, seen.prefill.pending_s) == (3, 1, 2, 90.0)
    assert (seen.decode.ready, seen.decode.terminating) == (1, 1)
    found.children["Pod", "p1"]["status"]["conditions"].append({"type": "PodScheduled", "status": "True"})
    found.children["Pod", "p1"]["status"]["containerStatuses"] = [
        {"state": {"waiting": {"reason": "ContainerCreating"}}}
    ]
    assert look(found, [reply("a")], Memory()).prefill.pending == 1  # its containers are being made: it is on its way
    found.children["Pod", "p1"]["status"]["containerStatuses"] = [{"state": {"waiting": {"reason": "ErrImagePull"}}}]
    assert look(found, [reply("a")], Memory()).prefill.pending == 2
    assert (seen.prefill.gpus, seen.decode.gpus) == (1, 2)
    assert seen.start_s == 20.0


def test_pods_not_yet_asked_to_go_hold_their_gpus_too() -> None:
    seen = look(known(pod("decode", "d0"), pod("decode", "d1"), decode=1), [reply("a")], Memory())
    assert seen.decode.terminating == 1  # the Deployment wants one, two are there


def test_workers_are_counted_once_by_their_newest_word_and_remembered() -> None:
    memory = Memory()
    old = worker("prefill", "p", 3.0, queued_tokens=900)
    new = worker("prefill", "p", 0.1, queued_tokens=400, cost={"compute_s": 0.5})
    decode = worker("decode", "d", kv_capacity_tokens=5000, running_requests=3)
    seen = look(known(), [reply("a", workers=(old, decode)), reply("b", workers=(new, decode))], memory)
    assert (seen.queued_tokens, seen.running, seen.decode.kv_capacity_tokens) == (400, 3, 5000)
    assert seen.prefill.cost.compute_s == 0.5
    later = look(known(), [reply("a"), reply("b")], memory)
    assert later.prefill.cost.compute_s == 0.5  # no worker is up: the last word counts
    assert later.decode.kv_capacity_tokens == 5000


def test_a_worker_that_has_measured_nothing_does_not_say_what_workers_cost() -> None:
    """Whichever of them comes first: scaling by a start's guess took back what it had just added."""
    memory = Memory()
    known_s, guess_s = {"compute_s": 0.5}, {"compute_s": 0.0001}
    for fitted, fresh in (("a", "b"), ("b", "a")):
        both = (worker("prefill", fitted, cost=known_s, cost_batches=40), worker("prefill", fresh, cost=guess_s))
        assert look(known(), [reply("r", workers=both)], memory).prefill.cost.compute_s == 0.5
    alone = (worker("prefill", "c", cost=guess_s),)
    assert look(known(), [reply("r", workers=alone)], memory).prefill.cost.compute_s == 0.5  # the last that knew
    assert look(known(), [reply("r", workers=alone)], Memory()).prefill.cost.compute_s == 0.0001  # nobody ever did


def test_one_worker_that_is_slower_than_its_siblings_does_not_speak_for_them() -> None:
    costs = {"a": 0.5, "b": 0.004, "c": 0.005}
    workers = tuple(worker("prefill", name, cost={"compute_s": s}, cost_batches=40) for name, s in costs.items())
    assert look(known(), [reply("r", workers=workers)], Memory()).prefill.cost.compute_s == 0.005


# ---------------------------------------------------------------- rules, schedules, status


def spec(**changes: Any) -> ScalingPolicySpec:
    data = {"targetRef": {"name": "chat"}, "prefill": {"min": 1, "max": 4}, "decode": {"min": 1, "max": 4}}
    return ScalingPolicySpec.model_validate(data | changes)


def test_schedules_are_active_for_their_duration_in_utc() -> None:
    working = {"cron": "0 8 * * 1-5", "duration": "10h", "prefill": {"min": 3}}
    weekend = {"cron": "0 0 * * 6", "duration": "48h", "decode": {"min": 2}}
    found = spec(schedules=[working, weekend])
    assert floors_at(found, NOW) == (3, 0, '"0 8 * * 1-5"')
    assert floors_at(found, NOW.replace(hour=8)) == (3, 0, '"0 8 * * 1-5"')  # from the very second
    assert floors_at(found, NOW.replace(hour=7, minute=59)) == (0, 0, "")
    assert floors_at(found, NOW.replace(hour=18)) == (0, 0, "")
    assert floors_at(found, datetime(2026, 3, 8, 23, 59, tzinfo=UTC)) == (0, 2, '"0 0 * * 6"')
    with pytest.raises(ConfigError, match="expected five cron fields"):
        floors_at(spec(schedules=[working | {"cron": "99 8 * * 1"}]), NOW)


def test_status_tells_conditions_decision_and_history() -> None:
    memory = Memory()
    look(known(pod("prefill", "p0"), pod("decode", "d0")), [reply("a", 0)], memory, 100.0)
    state, status, counts = State(), ScalingPolicyStatus(), []
    rules = rules_of(spec(), 1.0, 0.05, 15.0)
    for number in range(1, 14):
        found = known(pod("prefill", "p0"), pod("decode", "d0"), prefill=number % 2 + 1)
        seen = look(found, [reply("a", 600.0 * number)], memory, 100.0 + 15 * number)
        decision = decide(rules, state, seen)
        state = decision.state
        status = active(status, 7, decision, seen, rules, NOW)
        counts.append((decision.prefill, decision.decode))
    conditions = {item.type: item for item in status.conditions}
    assert [conditions[name].status for name in ("Active", "Limited", "ScaleBlocked")] == ["True", "False", "False"]
    assert status.current is not None
    assert (status.current.prefill, status.current.decode) == counts[-1]
    assert "requests/s" in status.current.reason
    assert "requests per s" in status.current.inputs
    assert status.summary == f"{counts[-1][0]}+{counts[-1][1]}"
    assert len(status.history) <= 10
    gone = inactive(status, 8, "Conflict", "HPA x and ScalingPolicy chat", NOW + timedelta(hours=1))
    assert gone.conditions[0].status == "False"
    assert gone.conditions[0].last_transition_time == "2026-03-02T10:00:00Z"
    assert gone.history == status.history
    assert worth_writing(status, gone, 0.0, 30.0)
    assert not worth_writing(gone, gone, 1e9, 30.0)
