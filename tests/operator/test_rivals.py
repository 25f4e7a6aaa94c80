"""Two writers of one count: an HPA on a role whose replicas the resource sets is named beside it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from lanewise.operator.rivals import drifted, rival, seen
from lanewise.operator.status import Facts, build_status
from lanewise.spec import LLMService
from lanewise.spec_status import LLMServiceStatus
from tests.operator.scaling_cases import deployment, hpa, service

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
    cluster = Cluster(hpa("mine", "chat-decode"))

    async def look(decode: int, before: str) -> str:
        return await seen(cluster, "ns", SET, live(prefill=1, decode=decode), before)  # type: ignore[arg-type]

    assert (await look(2, ""), cluster.asked) == ("", 0), "nothing has moved: nobody is asked"
    found = await look(5, "")
    assert "mine" in found
    assert await look(2, found) == found, "repaired, and it will write again"
    cluster.hpas.clear()
    assert (await look(2, found), cluster.asked) == ("", 3)


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
