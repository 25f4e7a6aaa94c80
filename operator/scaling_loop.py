"""ScalingPolicies at work: looks at each service in turn, asks the policy, writes the scale of both roles.

Owns: when to look, the order of writes (what shrinks first), and the memory of each policy.
Must not: decide (policy/scaling.py) or judge what it sees (scaling_view.py). Writes go through the fenced cluster.

A policy writes only `deployments/scale`, and only where the service has left both counts to others and no other writer
is there. One that may not write says why in its status and touches nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import ValidationError

from lanewise.errors import ConfigError
from lanewise.operator import names
from lanewise.operator.cluster import ApiError, Fenced, Unavailable, scale_of
from lanewise.operator.observed import Key, Known
from lanewise.operator.plan_config import LONGEST_HOLD_S
from lanewise.operator.reconcile import problems, read, router_addresses
from lanewise.operator.scaling_status import active, inactive, previous_status, worth_writing
from lanewise.operator.scaling_view import Memory, conflict, observe, oldest
from lanewise.policy.scaling import decide
from lanewise.policy.scaling_types import Decision, Observation, State
from lanewise.scaling_rules import floors_at, rules_of
from lanewise.spec import API_VERSION
from lanewise.spec_scaling import ScalingPolicy, ScalingPolicyStatus

if TYPE_CHECKING:
    from lanewise.operator.main import Leading

KIND = "ScalingPolicy"
MANAGER = "lanewise-scaling"
ASLEEP_S = 1.0  # between looks at a service that is scaled to zero: a held request waits for no more than this
LONGEST_LOOK_S = 20.0
ECHO_S = 5.0  # in which a watch tells of a write; later, somebody else has written since
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Entry:
    """One ScalingPolicy."""

    body: dict[str, Any]
    state: State = field(default_factory=State)
    memory: Memory = field(default_factory=Memory)
    due: float = 0.0  # monotonic
    written_at: float = float("-inf")
    asked: tuple[int, int] = (0, 0)  # counts that were written last
    asked_at: float = float("-inf")  # monotonic

    def unseen(self, known: Known, service: str, now: float) -> bool:
        """Whether the watch has yet to tell of what was just written: on older counts no decision may rest."""
        found = (known.child("Deployment", f"{service}-{role}") for role in names.WORKERS)
        there = tuple(int(item["spec"].get("replicas", 1)) if item is not None else -1 for item in found)
        return now - self.asked_at < ECHO_S and there != self.asked


class Scaler:
    """`run()` is a task of the leader."""

    def __init__(self, leading: Leading) -> None:
        self._leading = leading
        self._entries: dict[Key, _Entry] = {}
        self._period_s = leading.config.scaling_period_s
        self._wake = asyncio.Event()

    def on_event(self, body: dict[str, Any], deleted: bool) -> None:
        """A ScalingPolicy was seen, changed or deleted."""
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        entry = self._entries.get(key)
        targets = {_target(body), *([_target(entry.body)] if entry is not None else [])}
        if deleted:
            self._entries.pop(key, None)
        elif entry is None or entry.body["metadata"]["uid"] != body["metadata"]["uid"]:
            self._entries[key] = _Entry(body)
        else:
            changed = entry.body["metadata"].get("generation") != body["metadata"].get("generation")
            entry.body = body
            entry.due = 0.0 if changed else entry.due
        for target in targets:
            self._note_firsts(key[0], target)
        self._wake.set()

    def _note_firsts(self, namespace: str, target: str) -> None:
        """Counts with which the Deployments of a service are created, should they not exist yet: of who scales it."""
        firsts = self._leading.reconciler.first_replicas
        firsts.pop((namespace, target), None)
        if rivals := [body for body in self._bodies(namespace) if _target(body) == target]:
            spec = oldest(rivals)["spec"]
            counts = {f"{target}-{role}": int(spec[role].get("min", 1)) for role in names.WORKERS}
            firsts[namespace, target] = counts

    def _bodies(self, namespace: str) -> list[dict[str, Any]]:
        return [entry.body for (place, _), entry in self._entries.items() if place == namespace]

    async def run(self) -> None:
        """Never ends by itself. A look that fails is repeated at the next turn; nothing is written meanwhile."""
        while True:
            now = time.monotonic()
            for key, entry in list(self._entries.items()):
                if entry.due <= now:
                    entry.due = now + self._period_s
                    await self._look_safely(key, entry)
            soonest = min((entry.due for entry in self._entries.values()), default=now + self._period_s)
            self._wake.clear()
            try:
                async with asyncio.timeout(max(soonest - time.monotonic(), 0.05)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _look_safely(self, key: Key, entry: _Entry) -> None:
        try:
            async with asyncio.timeout(LONGEST_LOOK_S):
                await self._look(key, entry)
        except Fenced:
            raise
        except (ApiError, Unavailable, TimeoutError) as error:
            log.warning("scaling_failed", policy=key, error=f"{type(error).__name__}: {error}")

    # ------------------------------------------------------------ one look

    async def _look(self, key: Key, entry: _Entry) -> None:
        now, previous = datetime.now(UTC), previous_status(entry.body)
        generation = int(entry.body["metadata"].get("generation", 0))
        target = (key[0], _target(entry.body))
        known = self._leading.store.get(target)
        unread = known.service is not None and known.listed_at is None  # a watch began anew
        if unread or entry.unseen(known, target[1], time.monotonic()):
            entry.due = min(entry.due, time.monotonic() + ASLEEP_S)
            return
        refused = await self._refused(key, entry, known)
        if refused is not None:
            entry.state, entry.memory = State(), Memory()  # what was learned ends with the right to act on it
            await self._publish(key, entry, inactive(previous, generation, *refused, now))
            return
        policy, service = _typed(entry.body), read(known.service or {})
        rules = rules_of(policy.spec, service.spec.slo.ttft.seconds, service.spec.slo.tpot.seconds, self._period_s)
        seen = await self._observe(known, target, entry, policy, now)
        decision = decide(rules, entry.state, seen)
        entry.state = decision.state
        if (decision.prefill, decision.decode) != (seen.prefill.desired, seen.decode.desired):
            log.info("scaling", policy=key, prefill=decision.prefill, decode=decision.decode, reason=decision.reason)
            await self._write(target, known, seen, decision)
            entry.asked, entry.asked_at = (decision.prefill, decision.decode), time.monotonic()
        if rules.zero_after_s is not None and decision.prefill == decision.decode == 0:
            entry.due = min(entry.due, time.monotonic() + ASLEEP_S)
        await self._publish(key, entry, active(previous, generation, decision, seen, rules, now))

    async def _refused(self, key: Key, entry: _Entry, known: Known) -> tuple[str, str] | None:
        """(reason, message) why this policy may not scale now; None: it may."""
        target = _target(entry.body)
        if known.service is None:
            return "NoService", f"no LLMService {target} in namespace {key[0]}"
        try:
            service = read(known.service)
            floors_at(_typed(entry.body).spec, datetime.now(UTC))
        except ValidationError as error:
            return "Invalid", problems(error)
        except ConfigError as error:
            return "Invalid", str(error)
        if service.spec.paused:
            return "Paused", f"LLMService {target} is paused"
        hpas = await self._leading.cluster.list("HorizontalPodAutoscaler", key[0])
        found = conflict(entry.body, self._bodies(key[0]), hpas, known.service)
        if found is not None:
            return "Conflict", found.message
        missing = [role for role in names.WORKERS if known.child("Deployment", f"{target}-{role}") is None]
        return ("NoDeployment", f"Deployment {target}-{missing[0]} does not exist yet") if missing else None

    async def _observe(
        self, known: Known, target: Key, entry: _Entry, policy: ScalingPolicy, now: datetime
    ) -> Observation:
        pods, zero = known.of("Pod"), policy.spec.scale_to_zero
        hold_s = zero.max_hold.seconds if zero is not None else LONGEST_HOLD_S
        view = await self._leading.fleet.ask(router_addresses(pods), hold_s)
        silent = view.silent & set(router_addresses(pods, only_ready=True))  # who is not ready has no clients either
        seen = observe(known, target[1], view.replies, len(silent), entry.memory, now.timestamp(), now)
        prefill, decode, lines = floors_at(policy.spec, now)
        return replace(seen, prefill_floor=prefill, decode_floor=decode, floor_reason=lines)

    # ------------------------------------------------------------ writing

    async def _write(self, target: Key, known: Known, seen: Observation, decision: Decision) -> None:
        """What shrinks first, so that no budget is exceeded between the two writes."""
        changes = [
            ("prefill", seen.prefill.desired, decision.prefill),
            ("decode", seen.decode.desired, decision.decode),
        ]
        for role, before, after in sorted(changes, key=lambda change: change[2] - change[1]):
            if after == before:
                continue
            if after < before:
                await self._mark_costs(known, role)
            await self._leading.cluster.apply(
                scale_of(target[0], f"{target[1]}-{role}", after), subresource="scale", manager=MANAGER
            )

    async def _mark_costs(self, known: Known, role: str) -> None:
        """Best effort: the pods with least to lose go first. Whoever goes drains, so nothing depends on it."""
        for pod in known.of("Pod"):
            metadata = pod["metadata"]
            if metadata.get("labels", {}).get(names.COMPONENT_LABEL) != role or "deletionTimestamp" in metadata:
                continue
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
            cost = "100" if ready else "0"
            if metadata.get("annotations", {}).get(DELETION_COST) == cost:
                continue
            manifest = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": metadata["name"],
                    "namespace": metadata["namespace"],
                    "annotations": {DELETION_COST: cost},
                },
            }
            try:
                await self._leading.cluster.apply(manifest, manager=MANAGER)
            except (ApiError, Unavailable) as error:
                log.debug("deletion_cost_not_set", pod=metadata["name"], error=str(error))

    async def _publish(self, key: Key, entry: _Entry, status: ScalingPolicyStatus) -> None:
        now = time.monotonic()
        age_s = now - entry.written_at
        if not worth_writing(previous_status(entry.body), status, age_s, self._leading.config.status_period_s):
            return
        body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        metadata = {"name": key[1], "namespace": key[0]}
        manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": body}
        written = await self._leading.cluster.apply(manifest, subresource="status", manager=MANAGER)
        entry.written_at = now
        entry.body = {**entry.body, "status": written.get("status", body)}


def _target(body: Mapping[str, Any]) -> str:
    return str(body["spec"]["targetRef"]["name"])


def _typed(body: Mapping[str, Any]) -> ScalingPolicy:
    metadata = {"name": body["metadata"]["name"], "namespace": body["metadata"]["namespace"]}
    data = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": body.get("spec")}
    return ScalingPolicy.model_validate(data)


async def scale(leading: Leading) -> None:
    """The task that the leader runs (see main.LEADER_TASKS)."""
    scaler = Scaler(leading)
    leading.sinks[KIND] = scaler.on_event
    await scaler.run()
