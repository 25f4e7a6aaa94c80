"""What a ScalingPolicy sees: pods counted, routers summed, conflicts named. Pure."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lanewise.operator.scaling_view import Memory, conflict
from lanewise.policy.scaling_types import Demand
from tests.operator.scaling_cases import NOW, hpa, known, look, pod, policy, reply, service, worker

# ---------------------------------------------------------------- who writes


def test_the_oldest_policy_wins_and_the_others_name_it() -> None:
    old, young = policy("old"), policy("young", created="2026-02-01T00:00:00Z")
    assert conflict(old, [young, old], [], service()) is None
    found = conflict(young, [young, old], [], service())
    assert found is not None
    assert found.message == "ScalingPolicy old is older than young and scales LLMService chat"
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
    assert seen.prefill.watts == 700.0  # the hungriest stands for its role
    assert seen.decode.watts == 2 * 700.0  # nobody knows: no budget is exceeded by guessing low; two GPUs a worker
    told = look(known(), [reply("a", workers=(worker("decode", "d1", watts=300),))], memory, 110.0)
    assert told.decode.watts == 2 * 300.0
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
    partly = look(known(), [reply("a", 1050)], memory, 145.0, silent=1)
    assert partly.demand.requests == 40  # one of two routers answered: it stands for both
    starting = look(known(), [reply("a", 1060)], memory, 160.0)
    assert starting.demand.requests == 10  # the other is not ready, so it has no clients either
    assert look(known(), [], memory, 175.0, silent=2).demand.seconds == 0


def test_a_router_that_was_silent_for_minutes_is_no_burst_when_it_answers_again() -> None:
    memory = Memory()
    look(known(), [reply("a", 0), reply("b", 0)], memory, 0.0)
    for number in range(1, 21):  # each router takes 2 requests a second; b says nothing for five minutes
        seen = look(known(), [reply("a", 30 * number)], memory, 15.0 * number, silent=1)
        assert seen.demand.requests == 60
    back = look(known(), [reply("a", 630), reply("b", 630)], memory, 315.0)
    assert back.demand.requests == pytest.approx(60), "others have stood for what it did meanwhile"


def test_who_waited_briefly_between_two_looks_counts_as_held() -> None:
    memory = Memory()
    assert look(known(), [reply("a", held_total=7)], memory, 100.0).held == 0  # before the first look: long ago
    assert look(known(), [reply("a", held_total=9, held=1)], memory, 101.0).held == 2  # a client gave up at once
    assert look(known(), [reply("a", held_total=9)], memory, 102.0).held == 0


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


def test_a_pod_too_many_keeps_no_role_below_its_count() -> None:
    """A rollout that surges, or a role just rolled back whose Pending pod is still listed: nothing to roll back."""
    stuck = pod("prefill", "new", phase="Pending", ready=False, age_s=9000)
    seen = look(known(pod("prefill", "p0"), pod("prefill", "p1"), stuck, prefill=2), [reply("a")], Memory())
    assert (seen.prefill.pending, seen.prefill.pending_s, seen.prefill.terminating) == (0, 0.0, 1)


def test_pods_that_a_quota_refuses_are_as_stuck_as_pending_ones() -> None:
    found = known(pod("prefill", "p0"), prefill=3)
    since = (NOW - timedelta(seconds=300)).strftime("%Y-%m-%dT%H:%M:%SZ")
    refused = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "lastTransitionTime": since}
    assert look(found, [reply("a")], Memory()).prefill.pending == 0  # about to be made
    found.children["Deployment", "chat-prefill"]["status"] = {"conditions": [refused]}
    seen = look(found, [reply("a")], Memory())
    assert (seen.prefill.pending, seen.prefill.pending_s) == (2, 300.0)


def test_a_pod_that_leaves_holds_its_gpu_before_the_next_one_is_there() -> None:
    seen = look(known(pod("decode", "d0"), pod("decode", "d1", gone=True), decode=2), [reply("a")], Memory())
    assert seen.decode.terminating == 1


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
