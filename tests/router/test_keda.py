"""KEDA's external scaler over real gRPC: a client of KEDA's protocol, two routers, scripted workers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest

from lanewise.request import Sampling
from lanewise.router.keda_peers import together
from lanewise.router.main import Router
from lanewise.router.orders import Order
from lanewise.rpc import externalscaler_pb2 as es
from lanewise.rpc import externalscaler_pb2_grpc as es_grpc
from lanewise.rpc import lanewise_pb2 as pb
from tests.e2e.processes import free_port
from tests.router.scripted import ScriptedWorker, config, until


class Twin:
    """One worker as two routers see it: a scripted worker holds one session, so there is one for each router."""

    def __init__(self, role: str, name: str) -> None:
        self.sides = [ScriptedWorker(role, name) for _ in range(2)]
        self.sides[1].incarnation = self.sides[0].incarnation

    def say(self, **message: Any) -> None:
        for side in self.sides:
            side.say(**message)


class Two:
    """Two routers that know each other, one prefill and one decode worker, a KEDA client on the first router."""

    def __init__(self, routers: list[Router], workers: list[Twin], stub: Any) -> None:
        self.routers, self.workers, self.stub = routers, workers, stub


@contextlib.asynccontextmanager
async def two(roles: str = "pd", third: str = "", **settings: Any) -> AsyncIterator[Two]:
    names = {"p": "prefill", "d": "decode"}
    workers = [Twin(names[letter], f"{letter}{i}") for i, letter in enumerate(roles)]
    for side in (side for worker in workers for side in worker.sides):
        await side.start()
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    peers = tuple([*addresses, third] if third else addresses)
    routers = []
    for number, address in enumerate(addresses):
        seen = config([worker.sides[number] for worker in workers], peers=peers, hold_timeout_s=20.0, **settings)
        routers.append(Router(seen.model_copy(update={"grpc": address})))
    for router in routers:
        await router.start()
    async with grpc.aio.insecure_channel(str(routers[0].grpc)) as channel:
        try:
            for router in routers:
                await until(lambda router=router: len(router.roster.sessions()) == len(workers), "sessions")  # type: ignore[misc]
            yield Two(routers, workers, es_grpc.ExternalScalerStub(channel))  # type: ignore[no-untyped-call]
        finally:
            for router in routers:
                await router.stop()
            for side in (side for worker in workers for side in worker.sides):
                await side.stop()


def ref(**metadata: str) -> es.ScaledObjectRef:
    return es.ScaledObjectRef(name="chat-decode", namespace="default", scalerMetadata=metadata)


async def ask(router: Router, tokens: int = 4) -> asyncio.Task[int]:
    """A request at this router, over its public HTTP; the task ends with the status."""

    async def post() -> int:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as http:
            body = {"model": "fable", "prompt": "Once", "max_tokens": tokens}
            async with http.post(f"http://{router.http}/v1/completions", json=body) as response:
                await response.read()
                return response.status

    return asyncio.create_task(post())


async def value(made: Two, role: str, **metadata: str) -> float:
    request = es.GetMetricsRequest(scaledObjectRef=ref(role=role, **metadata), metricName=f"lanewise-{role}-load")
    reply = await made.stub.GetMetrics(request, timeout=5)
    (metric,) = reply.metricValues
    assert metric.metricValue == round(metric.metricValueFloat)
    return float(metric.metricValueFloat)


async def test_specs_and_bad_metadata() -> None:
    async with two() as made:
        reply = await made.stub.GetMetricSpec(ref(role="prefill"), timeout=5)
        assert [(s.metricName, s.targetSize, s.targetSizeFloat) for s in reply.metricSpecs] == [
            ("lanewise-prefill-load", 4, 4.0)
        ]
        reply = await made.stub.GetMetricSpec(ref(role="decode", target="62.5"), timeout=5)
        assert reply.metricSpecs[0].targetSizeFloat == 62.5
        for metadata, words in (
            ({}, "scalerMetadata.role: expected prefill or decode, got ''"),
            ({"role": "router"}, "expected prefill or decode"),
            ({"role": "decode", "target": "-1"}, "scalerMetadata.target: expected a number above 0"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await made.stub.GetMetricSpec(ref(**metadata), timeout=5)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert words in (error.value.details() or "")


async def test_metrics_are_sums_over_routers_and_workers_are_counted_once() -> None:
    async with two("pddd") as made:
        prefill, *decodes = made.workers
        deadline = time.monotonic() + 10
        seen: tuple[float, float] = (0.0, 0.0)
        while seen != (140, 7) and time.monotonic() < deadline:
            prefill.say(stats=pb.Stats(queued_requests=7))  # again: it also answers the routers' news of its peers
            for worker, used in zip(decodes, (50, 30, 60), strict=True):
                worker.say(stats=pb.Stats(kv_used_tokens=used, kv_capacity_tokens=100))
            await asyncio.sleep(0.05)
            seen = (await value(made, "decode"), await value(made, "prefill"))
        assert seen == (140, 7)  # both routers see the same worker


async def test_held_requests_of_every_router_count_and_activate() -> None:
    async with two("") as made:  # no worker at all: scaled to zero
        assert not (await made.stub.IsActive(ref(role="decode"), timeout=5)).result
        assert await value(made, "decode") == 0
        waiting = [_hold(router) for router in made.routers]
        try:
            assert (await made.stub.IsActive(ref(role="decode"), timeout=5)).result
            assert await value(made, "prefill") == 2
            assert await value(made, "decode") == 70  # one worker's worth
            assert await value(made, "decode", target="40") == 40  # by the target that KEDA divides by
        finally:
            for release in waiting:
                release()


async def test_requests_at_routers_that_have_never_seen_a_worker_count_and_activate() -> None:
    """Routers that started while the service was at zero: whoever asks them must be able to wake it."""
    async with two("", served_name="fable") as made:
        stream = made.stub.StreamIsActive(ref(role="decode"), timeout=60)
        assert not (await stream.read()).result
        asked = [await ask(router) for router in made.routers]
        for router in made.routers:
            await until(lambda router=router: router.front.num_early, "a request before any worker")  # type: ignore[misc]
        assert (await stream.read()).result
        assert (await made.stub.IsActive(ref(role="prefill"), timeout=5)).result
        assert (await value(made, "prefill"), await value(made, "decode")) == (2, 70)
        told = made.routers[0].metrics.render().decode()
        assert "lanewise_held_requests 1.0" in told
        for task in asked:
            task.cancel()
        stream.cancel()


def _hold(router: Router) -> Any:
    """One accepted request that waits for a worker, in the dispatcher itself: the front needs a model it has seen."""

    class Nobody:
        def put(self, choice: int, item: object) -> None: ...

    order = Order(
        request_id=f"held-{router.incarnation}",
        model="fable",
        prompt_ids=(1, 2, 3),
        sampling=Sampling(max_tokens=4, seed=1),
        deadline_at=time.monotonic() + 60,
        ttft_target_s=None,
    )
    router.dispatcher.start(order, Nobody(), 0)
    return lambda: router.dispatcher.cancel(order.request_id)


async def test_a_stream_tells_changes_within_a_second_wherever_they_happen() -> None:
    async with two("pd") as made:
        for side in (side for worker in made.workers for side in worker.sides):
            side.on_submit = side.silent
        stream = made.stub.StreamIsActive(ref(role="decode"), timeout=60)
        assert not (await stream.read()).result
        for router in reversed(made.routers):  # first the router that KEDA does not talk to
            task = await ask(router)
            await until(lambda router=router: router.dispatcher.num_running, "request under way")  # type: ignore[misc]
            since = time.monotonic()
            assert (await stream.read()).result
            assert time.monotonic() - since < 1.0
            for request_id in list(router.dispatcher._entries):
                router.dispatcher.cancel(request_id)
            since = time.monotonic()
            assert not (await stream.read()).result
            assert time.monotonic() - since < 1.0
            task.cancel()
        stream.cancel()


async def test_a_router_that_does_not_answer_costs_its_deadline_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, says nothing
        async with two("pd", third=f"127.0.0.1:{mute.getsockname()[1]}") as made:
            deadline = time.monotonic() + 10
            while await value(made, "prefill") != 3 and time.monotonic() < deadline:  # each question takes its second
                made.workers[0].say(stats=pb.Stats(queued_requests=3))
            since = time.monotonic()
            assert await value(made, "prefill") == 3
            assert time.monotonic() - since < 2.5


def test_the_newest_word_of_a_worker_counts() -> None:
    def reply(router: str, age: float, used: int, inflight: int) -> pb.FleetReply:
        worker = pb.FleetWorker(
            description=pb.Description(role="decode", incarnation="d"),
            stats=pb.Stats(kv_used_tokens=used),
            stats_age_s=age,
            inflight=inflight,
        )
        return pb.FleetReply(router=router, held=1, arrivals=2, workers=[worker])

    whole = together([reply("a", 0.5, 10, 1), reply("b", 0.1, 20, 2), reply("a", 0.5, 10, 1)])
    assert (whole.routers, whole.held, whole.arrivals, whole.under_way) == (2, 2, 4, 5)
    assert whole.workers[0].stats.kv_used_tokens == 20
