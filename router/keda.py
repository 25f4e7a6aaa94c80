"""KEDA's `externalscaler.ExternalScaler`, so that a ScaledObject can scale a role without a metrics server.

Owns: the metric of each role, what counts as active, and the words for bad metadata. Must not: scale anything.

`scalerMetadata`: `role` (prefill or decode), `target` (the value one worker is to have, default below).
prefill: requests that wait for prefill or for a worker, all routers together. decode: percent of a KV pool in use,
summed over the workers, so that 140 means the pools of 1.4 workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from lanewise.router.keda_peers import Peers, Whole
from lanewise.rpc import externalscaler_pb2 as es
from lanewise.rpc import externalscaler_pb2_grpc as es_grpc

Context = grpc.aio.ServicerContext[Any, Any]

TARGETS = {"prefill": 4.0, "decode": 70.0}
LOOK_S = 0.2  # between two looks of a stream at its own router
SPREAD_S = 0.3  # between two questions of a stream to all routers
SOON_S = 0.4  # deadline of those: with SPREAD_S and LOOK_S a change is told within a second


class ExternalScaler(es_grpc.ExternalScalerServicer):
    """One per router; any of them answers for the whole service."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def IsActive(self, request: es.ScaledObjectRef, context: Context) -> es.IsActiveResponse:
        await _role(request, context)
        return es.IsActiveResponse(result=active(await self._peers.ask()))

    async def StreamIsActive(self, request: es.ScaledObjectRef, context: Context) -> AsyncIterator[es.IsActiveResponse]:
        """The state at once, then every change within a second. Ends when KEDA goes or the router stops."""
        await _role(request, context)
        told: bool | None = None
        asked_at = float("-inf")
        loop = asyncio.get_running_loop()
        while True:
            now = active(await self._peers.local())
            if not now and loop.time() - asked_at >= SPREAD_S:
                asked_at = loop.time()
                now = active(await self._peers.ask(SOON_S))
            elif not now:
                now = bool(told)  # others may have work: they are asked again soon
            if now != told:
                told = now
                yield es.IsActiveResponse(result=now)
            await asyncio.sleep(LOOK_S)

    async def GetMetricSpec(self, request: es.ScaledObjectRef, context: Context) -> es.GetMetricSpecResponse:
        role = await _role(request, context)
        target = await _target(request, role, context)
        spec = es.MetricSpec(metricName=metric_name(role), targetSize=max(round(target), 1), targetSizeFloat=target)
        return es.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(self, request: es.GetMetricsRequest, context: Context) -> es.GetMetricsResponse:
        role = await _role(request.scaledObjectRef, context)
        if request.metricName and not request.metricName.endswith(metric_name(role)):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"metricName: expected {metric_name(role)!r} for role {role}, got {request.metricName!r}",
            )
        target = await _target(request.scaledObjectRef, role, context)
        value = load(role, await self._peers.ask(), target)
        name = request.metricName or metric_name(role)
        return es.GetMetricsResponse(
            metricValues=[es.MetricValue(metricName=name, metricValue=round(value), metricValueFloat=value)]
        )


def metric_name(role: str) -> str:
    return f"lanewise-{role}-load"


def active(whole: Whole) -> bool:
    """Someone has a request that has not ended; both roles wake and sleep together."""
    return whole.under_way > 0


def load(role: str, whole: Whole, target: float) -> float:
    """The metric of a role. Requests held for want of a worker count for both: for decode as one worker's `target`."""
    workers = [worker for worker in whole.workers if worker.description.role == role]
    if role == "prefill":
        return float(whole.held + sum(worker.stats.queued_requests for worker in workers))
    used = sum(
        100.0 * worker.stats.kv_used_tokens / max(worker.stats.kv_capacity_tokens, 1)
        for worker in workers
        if worker.stats.kv_capacity_tokens
    )
    return max(used, target if whole.held else 0.0)


async def _role(request: es.ScaledObjectRef, context: Context) -> str:
    role: str = request.scalerMetadata.get("role", "")
    if role not in TARGETS:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"scalerMetadata.role: expected prefill or decode, got {role!r}"
        )
    return role


async def _target(request: es.ScaledObjectRef, role: str, context: Context) -> float:
    text = request.scalerMetadata.get("target", "")
    try:
        value = float(text) if text else TARGETS[role]
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"scalerMetadata.target: expected a number above 0, got {text!r}"
        )
    return value
