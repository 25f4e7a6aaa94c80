"""One look at one service: what should exist is applied, what is seen becomes its status.

Owns: the order of a look, and when the next one is due. Must not: hold rules; they are in the pure modules it calls.
Every look starts from what is there, whatever happened before: events only say when to look.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog
from pydantic import ValidationError

from lanewise.config import OperatorConfig
from lanewise.errors import ConfigError
from lanewise.operator import names, rivals
from lanewise.operator.apply import Refusal, apply_objects, prune
from lanewise.operator.children import Children, first_refusal
from lanewise.operator.cluster import Cluster
from lanewise.operator.fleet import FleetClient, FleetView
from lanewise.operator.listing import Lister
from lanewise.operator.model_state import download_state, resolved
from lanewise.operator.observed import Key, Known, Store
from lanewise.operator.plan import plan, unsupported
from lanewise.operator.plan_types import Plan, PlanContext
from lanewise.operator.publish import Publisher, previous_status
from lanewise.operator.rollout import decide, fingerprint
from lanewise.operator.runtime import choose_runtime
from lanewise.operator.status import Facts, build_status, unreadable_status
from lanewise.operator.status_pods import role_facts
from lanewise.spec import API_VERSION, LLMService
from lanewise.spec_status import LLMServiceStatus, ModelStatus, RuntimeStatus

BUSY_S = 3.0  # between looks at the fleet of a service that is changing
UNREACHABLE_S = 60.0
GLANCE_S = 0.1  # a look waits this long for routers; those that take longer answer beside it, and cause another
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 300.0  # of what the API server refused
JITTER = 0.1

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Memory:
    """What of a service is remembered between looks; losing it costs some reads, nothing else."""

    applied: tuple[Any, ...] = ()  # what the last complete application was made from
    target: str | None = None  # the fingerprint it aimed at
    blocked: tuple[str, str] | None = None  # what the API server refused then
    retry_at: float = 0.0  # when a refused write is tried again although nothing has changed
    refusals: int = 0
    fleet: FleetView = field(default_factory=FleetView)
    fleet_due: float = 0.0
    asked: tuple[str, ...] = ()  # the routers that were, and whether they were ready: others are asked at once
    asking: asyncio.Task[FleetView] | None = None
    unanswered: int = 0
    rival: str = ""  # who else writes a count that the resource sets


@dataclass(frozen=True, slots=True)
class Basis:
    """What a look is made on: pinned runtime, resolved model, and what keeps it from applying anything."""

    runtime: RuntimeStatus | None
    model: ModelStatus | None
    blocked: tuple[str, str] | None


class Reconciler:
    """`look(key)` is the work of the queue."""

    def __init__(
        self,
        config: OperatorConfig,
        own: RuntimeStatus,
        cluster: Cluster,
        store: Store,
        fleet: FleetClient,
        wake: Callable[[Key], None],
    ) -> None:
        """`wake` makes a key due at once."""
        self._config, self._own, self._cluster, self._store, self._fleet = config, own, cluster, store, fleet
        self._wake = wake
        self.lister = Lister(cluster, store)
        self._children = Children(cluster, store)
        self._publisher = Publisher(cluster, store, config)
        self._memories: dict[Key, Memory] = {}
        self.first_replicas: dict[Key, dict[str, int]] = {}
        """Counts for Deployments that are created without replicas in the resource, by name; a ScalingPolicy's min."""

    async def look(self, key: Key) -> float | None:
        """Seconds until the next look; None where there is nothing to look at."""
        known = self._store.get(key)
        now = time.monotonic()
        if known.listed_at is None or now - known.listed_at > self._config.resync_s:
            await self.lister.refresh(key)
        body = known.service
        if body is None or "deletionTimestamp" in body["metadata"]:
            gone = self._memories.pop(key, None)  # children go with their owner
            if gone is not None and gone.asking is not None:
                gone.asking.cancel()
            if body is None:
                self._store.forget(key)
            return None
        memory = self._memories.setdefault(key, Memory())
        previous = previous_status(body)
        try:
            service = read(body)
        except ValidationError as error:
            status = unreadable_status(_generation(body), problems(error), previous, datetime.now(UTC))
            await self._publisher.publish(key, status)
            return self._config.resync_s
        runtime, model = self._pin(service, previous), resolved(service, known, previous.model)
        refused = unsupported(service)
        if isinstance(runtime, ConfigError):
            blocked: tuple[str, str] | None = ("UnknownRuntime", str(runtime))
        elif refused is not None:
            blocked = ("Unsupported", refused)
        else:
            if not service.spec.paused:
                memory.rival = await rivals.seen(self._cluster, key[0], body, _live(key, known), memory.rival)
                await self._apply(key, service, known, memory, runtime, model)
            blocked = memory.blocked
        await self._ask_fleet(key, memory, known.of("Pod"))
        if memory.asking is not None and not memory.fleet.taken_at:
            return BUSY_S  # nothing is known of the fleet yet: its answer, or its silence, wakes this key
        pinned = previous.runtime if isinstance(runtime, ConfigError) else runtime
        facts = await self._facts(key, service, known, memory, Basis(pinned, model, blocked))
        status = build_status(service, facts, previous, datetime.now(UTC))
        written = await self._publisher.publish(key, status)
        return self._next(memory, status, settled=written)

    def _pin(self, service: LLMService, previous: LLMServiceStatus) -> RuntimeStatus | ConfigError:
        try:
            return choose_runtime(service, previous.runtime, self._own)
        except ConfigError as error:
            return error

    async def _apply(
        self,
        key: Key,
        service: LLMService,
        known: Known,
        memory: Memory,
        runtime: RuntimeStatus,
        model: ModelStatus | None,
    ) -> None:
        """Everything that differs is written; `memory` then says how that went."""
        assert known.service is not None  # look() has seen to it
        metadata = known.service["metadata"]
        monitors = await self.lister.monitors()
        commit = None if model is None else model.commit
        same = (known.revision, metadata.get("generation"), runtime, commit, monitors)
        hold = decide(memory.target, _live(key, known)).hold
        if (*same, hold) == memory.applied and not self._retries(memory):
            return
        context = PlanContext(
            namespace=key[0],
            uid=metadata["uid"],
            runtime=runtime,
            router_cluster_role=self._config.router_cluster_role,
            image_pull_policy=self._config.image_pull_policy,
            commit=commit,
            monitors=monitors,
        )
        try:
            wanted = plan(service, context)
        except ConfigError as error:
            memory.blocked = ("PodTemplateInvalid", str(error))
            return
        decode = wanted.deployments.get("decode")
        memory.target = None if decode is None else fingerprint(decode)
        hold = decide(memory.target, _live(key, known)).hold
        refusals = await self._write(key, service, wanted, hold, context.uid)
        memory.blocked = first_refusal(refusals)
        memory.refusals = memory.refusals + 1 if refusals else 0
        memory.retry_at = time.monotonic() + min(LONGEST_RETRY_S, FIRST_RETRY_S * 2**memory.refusals)
        memory.applied = (*same, hold)

    def _retries(self, memory: Memory) -> bool:
        return memory.blocked is not None and time.monotonic() >= memory.retry_at

    async def _write(
        self, key: Key, service: LLMService, wanted: Plan, hold: frozenset[str], uid: str
    ) -> tuple[Refusal, ...]:
        objects = await self._children.settle(key, service, wanted, hold)
        invalid = await self._children.check_templates(key, service, objects)
        if invalid:
            return invalid
        first = self.first_replicas.get(key, {})
        applied = await apply_objects(self._cluster, self._store, key, objects, first)
        if not applied.refusals:
            planned = [*objects, *(item for item in wanted.objects if item["kind"] == "Job")]
            await prune(self._cluster, self._store, key, planned, uid)
            await self._children.forget_old_revisions(key)
        return applied.refusals

    async def _facts(self, key: Key, service: LLMService, known: Known, memory: Memory, basis: Basis) -> Facts:
        pods, deployments = known.of("Pod"), _live(key, known)
        assert known.service is not None  # look() has seen to it
        return Facts(
            generation=_generation(known.service),
            namespace=key[0],
            roles={role: role_facts(role, deployments[role], pods) for role in names.ROLES},
            rollout=decide(memory.target, deployments),
            fleet=memory.fleet,
            runtime=basis.runtime,
            model=basis.model,
            download=await download_state(service, known, basis.model),
            degraded=basis.blocked,
            rival=memory.rival,
        )

    async def _ask_fleet(self, key: Key, memory: Memory, pods: list[dict[str, Any]]) -> None:
        """A fresh view where one is due. Routers that do not answer keep nobody waiting but their own service."""
        ready = tuple(router_addresses(pods, only_ready=True))
        if memory.asking is not None or (time.monotonic() < memory.fleet_due and ready == memory.asked):
            return
        addresses, memory.asked, memory.fleet_due = router_addresses(pods), ready, math.inf  # _next() says when
        if not addresses:
            memory.fleet, memory.unanswered = FleetView(), memory.unanswered + 1
            return
        asking = memory.asking = asyncio.create_task(self._fleet.ask(addresses))

        def late(done: asyncio.Task[FleetView]) -> None:
            self._answered(memory, done)
            self._wake(key)

        await asyncio.wait({asking}, timeout=GLANCE_S)
        if asking.done():
            self._answered(memory, asking)
        else:
            asking.add_done_callback(late)

    def _answered(self, memory: Memory, asking: asyncio.Task[FleetView]) -> None:
        memory.asking = None
        if asking.cancelled():
            return
        if error := asking.exception():  # a defect of ours: silence is none
            log.error("fleet_defect", error=f"{type(error).__name__}: {error}")
        memory.fleet = FleetView() if error else asking.result()
        memory.unanswered = 0 if memory.fleet.answered else memory.unanswered + 1

    def _next(self, memory: Memory, status: LLMServiceStatus, *, settled: bool) -> float:
        """Soon while something changes, rarely when nothing does; a fleet that does not answer is asked less."""
        conditions = {item.type: item for item in status.conditions}
        changing = conditions["Progressing"].status == "True" or conditions["Ready"].status != "True"
        verified = conditions["KVPathReady"].status == "True"
        period = BUSY_S if changing or not verified else self._config.fleet_period_s
        if memory.unanswered:
            period = min(UNREACHABLE_S, BUSY_S * 2 ** min(memory.unanswered, 10))
        if not settled:  # numbers wait for their turn
            period = min(period, self._config.status_period_s)
        period *= random.uniform(1 - JITTER, 1 + JITTER)
        if memory.asking is None and memory.fleet_due == math.inf:
            memory.fleet_due = time.monotonic() + 0.9 * period
        return period


def read(body: dict[str, Any]) -> LLMService:
    """The resource as typed data; what the API server added to its metadata is left out."""
    metadata = {"name": body["metadata"]["name"], "namespace": body["metadata"]["namespace"]}
    data = {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": metadata, "spec": body.get("spec")}
    return LLMService.model_validate(data)


def problems(error: ValidationError) -> str:
    """Every field at fault, in one line."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


def router_addresses(pods: list[dict[str, Any]], *, only_ready: bool = False) -> list[str]:
    """gRPC addresses of the routers that run, those that drain included."""
    found = []
    for pod in pods:
        labels, status = pod["metadata"].get("labels", {}), pod.get("status", {})
        address = status.get("podIP")
        conditions = {item["type"]: item["status"] for item in status.get("conditions", [])}
        if only_ready and conditions.get("Ready") != "True":
            continue
        if labels.get(names.COMPONENT_LABEL) == "router" and status.get("phase") == "Running" and address:
            host = f"[{address}]" if ":" in address else address
            found.append(f"{host}:{names.GRPC_PORT}")
    return sorted(found)


def _live(key: Key, known: Known) -> dict[str, dict[str, Any] | None]:
    return {role: known.child("Deployment", f"{key[1]}-{role}") for role in names.ROLES}


def _generation(body: dict[str, Any]) -> int:
    return int(body["metadata"].get("generation", 0))
