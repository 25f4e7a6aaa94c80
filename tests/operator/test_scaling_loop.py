"""The operator's loop over ScalingPolicies: what it writes, in which order, and what keeps it from writing anything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lanewise.config import OperatorConfig
from lanewise.operator.cluster import Unavailable
from lanewise.operator.fleet import FleetView
from lanewise.operator.observed import Store
from lanewise.operator.scaling_loop import Scaler
from lanewise.policy.scaling_types import Decision, State
from tests.operator.scaling_cases import deployment, hpa, pod, reply

KEY, SERVICE = ("here", "chat"), ("here", "chat")
SPEC = {
    "targetRef": {"name": "chat"},
    "prefill": {"min": 1, "max": 4},
    "decode": {"min": 2, "max": 4},
    "scaleToZero": {"maxHold": "2m"},
}


class World:
    """An API server of dictionaries, routers that answer, and one Scaler on them."""

    def __init__(self, prefill: int = 1, decode: int = 2) -> None:
        self.writes: list[tuple[str, str, int]] = []  # (subresource, name, replicas)
        self.statuses: dict[str, Any] = {}  # of policies, by name
        self.hpas: list[dict[str, Any]] = []
        self.holds: list[float | None] = []
        self.answers: tuple[Any, ...] = (reply("r"),)
        self.down = False
        self.store = Store()
        self.firsts: dict[Any, Any] = {}
        leading = SimpleNamespace(
            config=OperatorConfig(status_period_s=0.0),
            cluster=self,
            store=self.store,
            fleet=SimpleNamespace(ask=self.ask),
            reconciler=SimpleNamespace(first_replicas=self.firsts),
        )
        self.scaler = Scaler(leading)  # type: ignore[arg-type]
        service = {"model": {"uri": "builtin://fable"}, "prefill": {}, "decode": {}}
        self.see("LLMService", {"name": "chat", "generation": 1}, spec=service)
        for role, count in (("prefill", prefill), ("decode", decode)):
            self.deploy(role, count)
        known = self.store.get(SERVICE)
        self.store.relisted(SERVICE, known.service, list(known.children.values()), time.monotonic())

    def see(self, kind: str, metadata: dict[str, Any], **body: Any) -> None:
        metadata = {
            "namespace": "here",
            "uid": metadata["name"],
            "resourceVersion": str(time.monotonic_ns()),
        } | metadata
        item = {"apiVersion": "lanewise.io/v1alpha1", "kind": kind, "metadata": metadata, **body}
        (self.store.service if kind == "LLMService" else self.store.child)(item, False)

    def deploy(self, role: str, count: int) -> None:
        made = deployment(role, count)
        labels = {"lanewise.io/service": "chat", "app.kubernetes.io/component": role}
        self.see("Deployment", made["metadata"] | {"labels": labels}, spec=made["spec"])

    def policy(self, name: str = "chat", created: str = "2026-01-01T00:00:00Z", **spec: Any) -> None:
        metadata = {"name": name, "namespace": "here", "uid": name, "creationTimestamp": created, "generation": 1}
        self.scaler.on_event({"metadata": metadata, "spec": SPEC | spec}, False)

    async def look(self, name: str = "chat") -> None:
        key = ("here", name)
        await self.scaler._look_safely(key, self.scaler._entries[key])

    # ------------------------------------------------------------ what Leading.cluster and .fleet do

    async def list(self, kind: str, namespace: str) -> list[dict[str, Any]]:
        if self.down:
            raise Unavailable("nobody answers")
        return self.hpas

    async def apply(self, manifest: Any, *, subresource: str = "", manager: str = "") -> dict[str, Any]:
        name = manifest["metadata"]["name"]
        if subresource == "status":
            self.statuses[name] = manifest["status"]
            return dict(manifest)
        assert manager == "lanewise-scaling"
        assert subresource == "scale" or manifest["kind"] == "Pod", "nothing but scale and pods' deletion cost"
        if subresource == "scale":
            self.writes.append((manifest["kind"], name, manifest["spec"]["replicas"]))
        return dict(manifest)

    async def ask(self, addresses: Sequence[str], max_hold_s: float | None = None) -> FleetView:
        self.holds.append(max_hold_s)
        return FleetView(answered=len(self.answers), replies=self.answers)

    def active(self, name: str = "chat") -> tuple[str, str, str]:
        found = next(c for c in self.statuses[name]["conditions"] if c["type"] == "Active")
        return found["status"], found["reason"], found["message"]


def decides(monkeypatch: pytest.MonkeyPatch, prefill: int, decode: int) -> None:
    made = Decision(prefill, decode, "because", State())
    monkeypatch.setattr("lanewise.operator.scaling_loop.decide", lambda rules, state, seen: replace(made, state=state))


async def test_what_shrinks_is_written_first_and_nothing_but_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else both counts together would pass the budget between the two writes."""
    for before, after, order in (((1, 4), (3, 2), ["decode", "prefill"]), ((4, 1), (2, 3), ["prefill", "decode"])):
        world = World(*before)
        world.policy()
        decides(monkeypatch, *after)
        await world.look()
        assert [name.removeprefix("chat-") for _, name, _ in world.writes] == order
        assert world.active()[:2] == ("True", "Deciding")
        assert world.statuses["chat"]["summary"] == f"{after[0]}+{after[1]}"


async def test_no_decision_rests_on_counts_from_before_the_last_write(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, 2)
    world.policy()
    decides(monkeypatch, 3, 2)
    await world.look()
    decides(monkeypatch, 1, 4)  # as if prefill were still at 1: unwritten, it would stay at 3 beside 4
    await world.look()
    assert world.writes == [("Scale", "chat-prefill", 3)], "the watch has not told of it yet"
    world.deploy("prefill", 3)
    await world.look()
    assert world.writes[1:] == [("Scale", "chat-prefill", 1), ("Scale", "chat-decode", 4)]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_beside_an_hpa_nothing_is_written_and_both_are_named(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    world = World()
    world.hpas = [hpa("mine", f"chat-{role}")]
    world.policy()
    decides(monkeypatch, 4, 4)
    await world.look()
    status, reason, message = world.active()
    assert (status, reason) == ("False", "Conflict")
    assert "HorizontalPodAutoscaler mine" in message
    assert "ScalingPolicy chat" in message
    assert not world.writes
    world.hpas = []
    await world.look()
    assert len(world.writes) == 2
    assert world.active()[:2] == ("True", "Deciding")


async def test_of_two_policies_the_older_writes_and_first_counts_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.policy("old")
    world.policy("young", "2026-02-01T00:00:00Z", decode={"min": 4, "max": 4})
    assert world.firsts[SERVICE] == {"chat-prefill": 1, "chat-decode": 2}
    decides(monkeypatch, 4, 4)
    await world.look("young")
    assert (world.active("young")[:2], world.writes) == (("False", "Conflict"), [])
    await world.look("old")
    assert len(world.writes) == 2
    world.scaler.on_event(world.scaler._entries["here", "old"].body, True)
    assert world.firsts[SERVICE] == {"chat-prefill": 1, "chat-decode": 4}


async def test_without_an_answer_of_the_api_server_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.down = True
    world.policy()
    decides(monkeypatch, 4, 4)
    await world.look()  # it could not be asked whether somebody else writes
    assert (world.writes, world.statuses) == ([], {})


async def test_no_service_no_routers_and_paused_services_change_nothing() -> None:
    world = World()
    world.policy("lost", targetRef={"name": "nobody"})
    await world.look("lost")
    assert world.active("lost") == ("False", "NoService", "no LLMService nobody in namespace here")
    world.policy()
    world.answers = ()
    await world.look()
    assert "no router answered" in world.statuses["chat"]["current"]["reason"]
    world.see("LLMService", {"name": "chat"}, spec={"paused": True, "model": {"uri": "builtin://fable"}})
    await world.look()
    assert world.active()[:2] == ("False", "Paused")
    assert not world.writes


async def test_routers_are_told_how_long_requests_may_wait_for_the_first_worker() -> None:
    world = World()
    world.policy()
    await world.look()
    world.policy("plain", scaleToZero=None)
    world.scaler._entries.pop(KEY)
    await world.look("plain")
    assert world.holds == [120.0, 600.0]


async def test_a_held_request_wakes_both_roles_within_two_looks() -> None:
    world = World(0, 0)
    for name in ("r1", "r2"):
        labels = {"lanewise.io/service": "chat"}
        found = pod("router", name)
        world.see("Pod", found["metadata"] | {"labels": found["metadata"]["labels"] | labels}, status=found["status"])
    world.policy()
    await world.look()
    assert not world.writes
    entry = world.scaler._entries[KEY]
    assert entry.due - time.monotonic() <= 1.0 or entry.due == 0.0
    world.answers = (reply("r", held=1),)
    await world.look()
    assert world.writes == [("Scale", "chat-prefill", 1), ("Scale", "chat-decode", 2)]
