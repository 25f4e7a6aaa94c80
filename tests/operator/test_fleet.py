"""Several routers' words in one view, over real gRPC; and how operators keep out of each other's namespaces."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from lanewise.operator.fleet import FleetClient, merge
from lanewise.operator.reconcile import router_addresses
from lanewise.operator.scope import DURATION_S, MARKER, Scope
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc


def worker(incarnation: str, age_s: float, *, ready: bool = True, role: str = "decode") -> Any:
    description = pb.Description(role=role, name=f"pod-{incarnation}", incarnation=incarnation, fingerprint="f")
    stats = pb.Stats(drain_eta_s=age_s, links=[pb.LinkInfo(peer="x", state="verified")])
    return pb.FleetWorker(description=description, stats=stats, ready=ready, stats_age_s=age_s)


def reply(*workers: Any, **fields: Any) -> Any:
    return pb.FleetReply(workers=workers, **fields)


def test_sums_by_router_and_the_newest_by_incarnation() -> None:
    first = reply(worker("a", 5.0, ready=False), worker("b", 0.1), arrivals=3, held=1)
    second = reply(worker("a", 0.2), arrivals=4, held=0, models=[pb.FleetModel(name="m")])
    view = merge([first, second], 3, 7.0)
    assert (view.asked, view.answered, view.arrivals, view.held, view.taken_at) == (3, 2, 7, 1, 7.0)
    assert [(item.incarnation, item.ready) for item in view.workers] == [("a", True), ("b", True)]
    assert [item.age_s for item in view.workers] == pytest.approx([0.2, 0.1])
    assert view.models == {"m"}


def test_means_are_weighted() -> None:
    def with_remote(weight: float, ttft_s: float) -> Any:
        way = pb.PrefillWay(weight=weight, ttft_s=ttft_s, other_ttft_s=2 * ttft_s)
        return reply(disaggregation=pb.Disaggregation(remote=way))

    view = merge([with_remote(30, 0.1), with_remote(10, 0.5), reply()], 3, 0.0)
    assert view.remote.weight == 40
    assert view.remote.ttft_s == pytest.approx(0.2)
    assert view.remote.other_ttft_s == pytest.approx(0.4)
    assert view.local.weight == 0


def test_lanes_by_name_with_their_worst_tail() -> None:
    lanes = [pb.FleetLane(name="long", workers=2, ttft_p99_s=1.0), pb.FleetLane(name="short", max_tokens=256)]
    other = [pb.FleetLane(name="long", workers=2, ttft_p99_s=3.0)]
    view = merge([reply(lanes=lanes), reply(lanes=other)], 2, 0.0)
    assert [(lane.name, lane.max_tokens, lane.ttft_p99_s) for lane in view.lanes] == [
        ("short", 256, 0.0),
        ("long", 0, 3.0),
    ]


class Routers(pb_grpc.FleetServicer):
    """A router that answers after a while."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    async def Snapshot(self, request: Any, context: Any) -> Any:
        await asyncio.sleep(self._delay_s)
        return reply(arrivals=1)


@asynccontextmanager
async def router(delay_s: float) -> AsyncIterator[str]:
    server = grpc.aio.server()
    pb_grpc.add_FleetServicer_to_server(Routers(delay_s), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_a_router_that_is_slow_or_gone_is_left_out_in_time() -> None:
    async with router(0.0) as quick, router(60.0) as slow:
        started = time.monotonic()
        view = await FleetClient(timeout_s=1.0).ask([quick, slow, "127.0.0.1:1"])
        assert time.monotonic() - started < 5
    assert (view.asked, view.answered, view.arrivals) == (3, 1, 1)


def test_whom_to_ask() -> None:
    def pod(component: str, phase: str = "Running", address: str = "10.0.0.1", ready: str = "True") -> dict[str, Any]:
        labels = {"app.kubernetes.io/component": component}
        status = {"phase": phase, "podIP": address, "conditions": [{"type": "Ready", "status": ready}]}
        return {"metadata": {"labels": labels}, "status": status}

    pods = [pod("router"), pod("router", "Pending"), pod("decode"), pod("router", address="fd00::1", ready="False")]
    assert router_addresses(pods) == ["10.0.0.1:50051", "[fd00::1]:50051"]
    assert router_addresses(pods, only_ready=True) == ["10.0.0.1:50051"]


# ---------------------------------------------------------------- scope


class Leases:
    """Markers of namespaced operators."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.applied: list[dict[str, Any]] = []

    async def list(self, kind: str, namespace: str | None = None, **query: str) -> list[dict[str, Any]]:
        assert query == {"fieldSelector": f"metadata.name={MARKER}"}
        return self.found

    async def apply(self, manifest: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.applied.append(manifest)
        return manifest


def lease(renewed: str) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "theirs", "name": MARKER},
        "spec": {"renewTime": renewed, "leaseDurationSeconds": DURATION_S},
    }


async def test_a_namespace_is_left_alone_while_its_marker_lives() -> None:
    cluster, now, woken = Leases(), 100.0, list[str]()
    scope = Scope(cluster, (), "me", woken.append, clock=lambda: now)  # type: ignore[arg-type]
    cluster.found = [lease("t0")]
    await scope.step()
    assert scope.skips("theirs")
    assert not scope.skips("ours")
    now += DURATION_S - 1
    cluster.found = [lease("t1")]
    await scope.step()
    now += DURATION_S - 1
    await scope.step()
    assert scope.skips("theirs")
    now += 2
    await scope.step()
    assert not scope.skips("theirs"), "not renewed while we looked on"
    assert woken == ["theirs", "theirs"]


async def test_a_namespaced_operator_marks_each_of_its_namespaces() -> None:
    cluster = Leases()
    scope = Scope(cluster, ("a", "b"), "me", lambda _: None)  # type: ignore[arg-type]
    await scope.step()
    assert [item["metadata"]["namespace"] for item in cluster.applied] == ["a", "b"]
    assert not scope.skips("a")
