"""Pods, routers' answers and policies for the tests of the operator's scaling."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from lanewise.operator.observed import Known
from lanewise.operator.scaling_view import Memory, observe
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.spec_scaling import ScalingPolicySpec

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


def reply(
    router: str, requests: float = 0, held: int = 0, workers: tuple[Any, ...] = (), held_total: int = 0
) -> pb.FleetReply:
    demand = pb.Demand(requests=requests, uncached_tokens=100 * requests)
    return pb.FleetReply(router=router, held=held, held_total=held_total, demand=demand, workers=workers)


def worker(role: str, incarnation: str, age_s: float = 0.0, watts: int = 0, **stats: Any) -> pb.FleetWorker:
    description = pb.Description(role=role, incarnation=incarnation, power_watts=watts)
    return pb.FleetWorker(description=description, stats=pb.Stats(**stats), stats_age_s=age_s, ready=True)


def look(found: Known, replies: list[pb.FleetReply], memory: Memory, at_s: float = 100.0, silent: int = 0) -> Any:
    return observe(found, "chat", replies, silent, memory, at_s, NOW)


def spec(**changes: Any) -> ScalingPolicySpec:
    data = {"targetRef": {"name": "chat"}, "prefill": {"min": 1, "max": 4}, "decode": {"min": 1, "max": 4}}
    return ScalingPolicySpec.model_validate(data | changes)
