"""What a status says for what was seen, and when it is worth a write."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lanewise.operator.fleet import FleetView, LaneFacts, LinkView, Way, WorkerFacts
from lanewise.operator.rollout import Phase, Rollout
from lanewise.operator.status import Download, Facts, build_status, unreadable_status
from lanewise.operator.status_pods import RoleFacts, role_facts
from lanewise.operator.status_write import eventful, worth_writing
from lanewise.spec import LLMService, builtin_service
from lanewise.spec_status import CONDITION_TYPES, Condition, LLMServiceStatus, ModelStatus

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
UP = RoleFacts(exists=True, desired=2, ready=2)
PREFILL = WorkerFacts("prefill", "p-0", "P", "f", True, False, 0.1, links=(LinkView("D", "verified"),))
DECODE = WorkerFacts("decode", "d-0", "D", "f", True, False, 0.1)
FLEET = FleetView(asked=1, answered=1, workers=(DECODE, PREFILL), models=frozenset({"fable"}))
GOOD = Facts(generation=7, namespace="chat", roles=dict.fromkeys(("router", "prefill", "decode"), UP), fleet=FLEET)
FRESH = LLMServiceStatus()


def service(**spec: Any) -> LLMService:
    data = builtin_service().model_dump(by_alias=True, exclude_none=True, exclude={"status"})
    data["spec"].update(spec)
    return LLMService.model_validate(data)


def roles(**changed: RoleFacts) -> Mapping[str, RoleFacts]:
    return {**GOOD.roles, **changed}


def condition(facts: Facts, kind: str, *, of: LLMService | None = None) -> Condition:
    made = build_status(of or service(), facts, FRESH, NOW)
    return next(item for item in made.conditions if item.type == kind)


def said(facts: Facts, kind: str, *, of: LLMService | None = None) -> tuple[str, str]:
    found = condition(facts, kind, of=of)
    return found.status, found.reason


def test_everything_is_said_of_a_good_service() -> None:
    made = build_status(service(), GOOD, FRESH, NOW)
    assert [item.type for item in made.conditions] == list(CONDITION_TYPES)
    assert {item.type: item.status for item in made.conditions} == {
        "Ready": "True",
        "Progressing": "False",
        "Degraded": "False",
        "ModelReady": "True",
        "RouterReady": "True",
        "PrefillReady": "True",
        "DecodeReady": "True",
        "KVPathReady": "True",
        "DisaggregationBeneficial": "Unknown",
    }
    assert all(item.observed_generation == 7 for item in made.conditions)
    assert made.url == "http://fable-router.chat.svc:8000"
    assert made.decode.summary == "2/2"


def test_time_moves_only_with_the_status_of_a_condition() -> None:
    first = build_status(service(), GOOD, FRESH, NOW)
    later = build_status(service(), replace(GOOD, roles=roles(decode=replace(UP, ready=1))), first, NOW + timedelta(60))
    assert [item.last_transition_time for item in later.conditions] == ["2026-11-21T12:00:00Z"] * 9
    gone = build_status(service(), replace(GOOD, roles=roles(decode=replace(UP, ready=0))), later, NOW + timedelta(1))
    moved = [item.type for item in gone.conditions if item.last_transition_time != "2026-11-21T12:00:00Z"]
    assert moved == ["Ready", "DecodeReady"]


@pytest.mark.parametrize(
    ("facts", "kind", "expected"),
    [
        (replace(GOOD, roles=roles(decode=replace(UP, ready=0))), "Ready", ("False", "NotReady")),
        (replace(GOOD, roles=roles(decode=replace(UP, ready=0, desired=0))), "Ready", ("True", "ScaledToZero")),
        (replace(GOOD, roles=roles(router=RoleFacts())), "RouterReady", ("False", "NotCreated")),
        (replace(GOOD, roles=roles(decode=replace(UP, ready=1))), "DecodeReady", ("True", "SomeReady")),
        (replace(GOOD, roles=roles(prefill=replace(UP, ready=0))), "Ready", ("False", "NotReady")),
        (replace(GOOD, degraded=("PodTemplateInvalid", "x")), "Degraded", ("True", "PodTemplateInvalid")),
        (replace(GOOD, degraded=("PodTemplateInvalid", "x")), "Progressing", ("False", "Blocked")),
        (replace(GOOD, degraded=("PodTemplateInvalid", "x")), "Ready", ("True", "Serving")),
        (replace(GOOD, rollout=Rollout(Phase.DECODE_FIRST)), "Progressing", ("True", "RollingDecode")),
        (replace(GOOD, rollout=Rollout(Phase.ROLLING, stalled="s")), "Degraded", ("True", "RolloutStalled")),
        (replace(GOOD, fleet=FleetView(asked=2)), "KVPathReady", ("Unknown", "FleetUnreachable")),
    ],
)
def test_conditions(facts: Facts, kind: str, expected: tuple[str, str]) -> None:
    assert said(facts, kind) == expected


def test_without_prefill_pods_only_always_is_not_ready() -> None:
    facts = replace(GOOD, roles=roles(prefill=replace(UP, ready=0)))
    assert said(facts, "Ready", of=service(disaggregation="Auto")) == ("True", "Serving")


def test_paused() -> None:
    assert said(GOOD, "Progressing", of=service(paused=True)) == ("False", "Paused")


# ---------------------------------------------------------------- fleet


def with_link(state: str, reason: str = "", **decode: Any) -> Facts:
    prefill = replace(PREFILL, links=(LinkView("D", state, reason),))
    return replace(GOOD, fleet=replace(FLEET, workers=(replace(DECODE, **decode), prefill)))


def test_a_failed_pair_is_named() -> None:
    found = condition(with_link("failed", "checksum"), "KVPathReady")
    assert (found.status, found.reason, found.message) == ("False", "LinkFailed", "p-0 -> d-0: checksum")


def test_other_fingerprints_and_those_that_leave_are_no_pair() -> None:
    assert said(with_link("failed", fingerprint="g"), "KVPathReady") == ("Unknown", "NotTested")
    assert said(with_link("failed", draining=True), "KVPathReady") == ("Unknown", "NotTested")


def test_untested_is_not_ready() -> None:
    assert said(with_link("untested"), "KVPathReady") == ("Unknown", "NotTested")


def test_combined_needs_no_path() -> None:
    combined = service(disaggregation="Auto", prefill={"replicas": 0})
    facts = replace(GOOD, fleet=replace(FLEET, workers=(DECODE,)))
    assert said(facts, "KVPathReady", of=combined) == ("True", "NotNeeded")
    assert said(facts, "DisaggregationBeneficial", of=combined) == ("False", "Disabled")


def ways(remote: Way, local: Way = Way()) -> Facts:  # noqa: B008  # frozen
    return replace(GOOD, fleet=replace(FLEET, remote=remote, local=local))


def test_disaggregation_is_measured() -> None:
    few = ways(Way(weight=5, ttft_s=0.1, other_ttft_s=0.2))
    assert said(few, "DisaggregationBeneficial") == ("Unknown", "NotEnoughRequests")
    better = condition(ways(Way(weight=50, ttft_s=0.1, other_ttft_s=0.2)), "DisaggregationBeneficial")
    assert (better.status, better.reason) == ("True", "RemoteFaster")
    assert "100ms" in better.message
    assert "200ms" in better.message
    off_by_half = Way(weight=50, ttft_s=0.05, predicted_ttft_s=0.15)
    worse = ways(Way(weight=50, ttft_s=0.1, other_ttft_s=0.2), off_by_half)
    assert said(worse, "DisaggregationBeneficial") == ("False", "LocalFaster")


def test_draining_pods_with_what_is_left() -> None:
    leaving = replace(DECODE, name="d-1", incarnation="E", draining=True, drain_eta_s=12.34)
    facts = replace(
        GOOD, roles=roles(decode=replace(UP, draining=1)), fleet=replace(FLEET, workers=(DECODE, PREFILL, leaving))
    )
    assert condition(facts, "DecodeReady").message == "2 of 2 ready, 1 draining (about 12 s left)"


# ---------------------------------------------------------------- model


def test_model_download() -> None:
    hub = service(model={"uri": "hf://a/b", "cache": {"claim": "c"}})
    waiting = replace(GOOD, download=Download("Downloading", "1.2 of 3.4 GB"), roles={"router": UP})
    found = condition(waiting, "ModelReady", of=hub)
    assert (found.status, found.reason, found.message) == ("False", "Downloading", "1.2 of 3.4 GB")
    assert said(waiting, "DecodeReady", of=hub) == ("False", "WaitingForModel")
    failed = replace(waiting, download=Download("Failed", "gated"))
    assert said(failed, "Degraded", of=hub) == ("True", "DownloadFailed")
    done = replace(GOOD, download=Download("Complete"), model=ModelStatus(uri="hf://a/b", revision="main", commit="c0"))
    assert said(done, "ModelReady", of=hub) == ("True", "Downloaded")


def test_a_resource_that_cannot_be_read_keeps_what_was_known() -> None:
    before = build_status(service(), GOOD, FRESH, NOW)
    made = unreadable_status(8, "spec.slo: expected a mapping", before, NOW)
    assert {item.type: item.reason for item in made.conditions}["Degraded"] == "InvalidSpec"
    assert made.decode == before.decode
    assert len(made.conditions) == 9


# ---------------------------------------------------------------- pods


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "x-1", "labels": {"app.kubernetes.io/component": "decode"}}, "status": status}


def test_why_pods_do_not_run() -> None:
    waiting = {"name": "worker", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    deployment = {"spec": {"replicas": 1}, "status": {}}
    found = role_facts("decode", deployment, [pod(containerStatuses=[waiting])])
    assert found.trouble == ("ImagePullBackOff", "pod x-1: ImagePullBackOff: no such image")
    assert said(replace(GOOD, roles=roles(decode=found)), "Degraded") == ("True", "PodsFailing")
    nowhere = [pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}])]
    found = role_facts("decode", deployment, nowhere)
    assert said(replace(GOOD, roles=roles(decode=found)), "DecodeReady") == ("False", "Unschedulable")
    assert said(replace(GOOD, roles=roles(decode=found)), "Degraded") == ("False", "AsExpected")


def test_quota_in_the_clusters_words() -> None:
    text = 'pods "x" is forbidden: exceeded quota: q'
    status = {"conditions": [{"type": "ReplicaFailure", "status": "True", "message": text}]}
    found = role_facts("decode", {"spec": {"replicas": 1}, "status": status}, [])
    degraded = condition(replace(GOOD, roles=roles(decode=found)), "Degraded")
    assert (degraded.reason, degraded.message) == ("QuotaExceeded", f"decode: {text}")


# ---------------------------------------------------------------- writes


def test_numbers_wait_and_words_do_not() -> None:
    def with_tail(seconds: float) -> LLMServiceStatus:
        fleet = replace(FLEET, lanes=(LaneFacts("short", 256, 1, seconds),))
        return build_status(service(), replace(GOOD, fleet=fleet), FRESH, NOW)

    old = with_tail(0.100)
    assert not worth_writing(old, old, 1000, 30)
    assert not worth_writing(old, with_tail(0.105), 1000, 30)
    assert not worth_writing(old, with_tail(0.200), 29, 30)
    assert worth_writing(old, with_tail(0.200), 30, 30)
    down = build_status(service(), replace(GOOD, roles=roles(decode=replace(UP, ready=0))), old, NOW)
    assert worth_writing(old, down, 0, 30)


def test_events_are_sparse() -> None:
    first = build_status(service(), GOOD, FRESH, NOW)
    assert [item.type for item in eventful(FRESH, first)] == ["Ready"]
    assert eventful(first, first) == []
    down = build_status(service(), replace(GOOD, roles=roles(decode=replace(UP, ready=0))), first, NOW)
    assert [item.type for item in eventful(first, down)] == ["Ready"]
