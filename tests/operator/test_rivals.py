"""Two writers of one count: an HPA on a role whose replicas the resource sets is named beside it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from lanewise.config import OperatorConfig
from lanewise.operator.observed import Key, Known, Store
from lanewise.operator.reconcile import Memory, Reconciler
from lanewise.operator.rivals import drifted, rival
from lanewise.operator.status import Facts, build_status
from lanewise.spec import LLMService
from lanewise.spec_status import LLMServiceStatus, RuntimeStatus
from tests.operator.scaling_cases import deployment, hpa, service

KEY: Key = ("ns", "chat")
RUNTIME = RuntimeStatus(version="0.1.0", rendering=1, control_image="c", worker_image="w")
SET = service(decode={"replicas": 2})


def live(**counts: int) -> dict[str, dict[str, Any] | None]:
    return {role: deployment(role, count) for role, count in counts.items()} | {"router": None}


def test_both_writers_are_named() -> None:
    found = rival(SET, [hpa("other", "else-decode"), hpa("mine", "chat-decode")])
    assert "HorizontalPodAutoscaler mine scales Deployment chat-decode" in found
    assert "LLMService chat sets spec.decode.replicas (2)" in found


def test_a_count_that_is_left_out_is_the_autoscalers() -> None:
    assert rival(SET, [hpa("mine", "chat-prefill")]) == ""
    assert rival(service(), [hpa("mine", "chat-decode")]) == ""


@pytest.mark.parametrize(("decode", "moved"), [(2, False), (3, True), (0, True)])
def test_only_a_count_that_somebody_moved_is_drift(decode: int, moved: bool) -> None:
    assert drifted(SET, live(prefill=7, decode=decode)) is moved


class Cluster:
    def __init__(self, *hpas: dict[str, Any]) -> None:
        self.hpas, self.asked = list(hpas), 0

    async def list(self, kind: str, namespace: str) -> list[dict[str, Any]]:
        assert (kind, namespace) == ("HorizontalPodAutoscaler", "ns")
        self.asked += 1
        return self.hpas


async def test_autoscalers_are_looked_for_when_a_count_moved_and_until_they_are_gone() -> None:
    cluster, memory = Cluster(hpa("mine", "chat-decode")), Memory()
    nothing: Any = None
    looking = Reconciler(OperatorConfig(), RUNTIME, cluster, Store(), nothing, nothing)  # type: ignore[arg-type]
    known = Known(service=SET)
    for item in (deployment("prefill", 1), deployment("decode", 2)):
        known.children["Deployment", item["metadata"]["name"]] = item
    await looking._look_for_rivals(KEY, SET, known, memory)
    assert (cluster.asked, memory.rival) == (0, ""), "nothing has moved: nobody is asked"
    known.children["Deployment", "chat-decode"] = deployment("decode", 5)
    await looking._look_for_rivals(KEY, SET, known, memory)
    assert "mine" in memory.rival
    known.children["Deployment", "chat-decode"] = deployment("decode", 2)  # repaired
    await looking._look_for_rivals(KEY, SET, known, memory)
    assert "mine" in memory.rival, "it will write again"
    cluster.hpas.clear()
    await looking._look_for_rivals(KEY, SET, known, memory)
    assert (cluster.asked, memory.rival) == (3, "")


def test_the_status_says_so_and_the_service_goes_on() -> None:
    spec = {"model": {"uri": "builtin://fable"}, "decode": {"replicas": 2}}
    metadata = {"name": "chat", "namespace": "ns"}
    body = LLMService.model_validate(
        {"apiVersion": "lanewise.io/v1alpha1", "kind": "LLMService", "metadata": metadata, "spec": spec}
    )
    facts = Facts(generation=1, namespace="ns", rival="both write")
    status = build_status(body, facts, LLMServiceStatus(), datetime.now(UTC))
    found = {item.type: item for item in status.conditions}
    assert (found["Degraded"].status, found["Degraded"].reason) == ("True", "Conflict")
    assert found["Degraded"].message == "both write"
    assert found["Progressing"].reason != "Blocked"
