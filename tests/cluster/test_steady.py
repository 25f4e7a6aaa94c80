"""What the operator does when there is nothing to do: nothing. Long; only in `make soak`.

`LANEWISE_STEADY_S` sets the length of the steady load.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from itertools import pairwise

import pytest

from tests.cluster.fleet import HTTP_PORT
from tests.cluster.idle import idle_service, wait_observed
from tests.cluster.kube.audit import Event, service_account
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.fakes import FAKE, fake_node
from tests.cluster.kube.process import Usage
from tests.cluster.kube.tools import wait_for
from tests.cluster.load import Load

STATUS = "llmservices.lanewise.io/status"
STEADY_S = float(os.environ.get("LANEWISE_STEADY_S", "600"))
SETTLE_S = 60.0
STATUS_EVERY_S = 30.0
CLOCK_S = 1.0
NUM_SERVICES = 200
NUM_NAMESPACES = 10
MANY = "many-"
QUIET_S = 60.0
MANY_DEADLINE_S = 900.0
MAX_MEMORY_BYTES = 300 * 1024 * 1024
MAX_CORES = 0.1
pytestmark = [pytest.mark.slow, pytest.mark.timeout(STEADY_S + 2 * MANY_DEADLINE_S)]


def by_the_operator(cluster: Cluster, chart: Chart, mark: int) -> list[Event]:
    """What it changed since the mark, renewals of its Lease left out."""
    own = cluster.audit.events(mark, user=service_account(chart.namespace, chart.name))
    return [event for event in own if event.is_write and event.resource != "leases"]


def test_a_steady_service_under_load_is_left_alone(own_cluster: Cluster, chart: Chart, namespace: str) -> None:
    cluster = own_cluster
    worker = {"replicas": 1, "resources": {"requests": {"cpu": "50m"}}, "podTemplate": cluster.worker_pod_template()}
    roles = {"prefill": worker, "decode": worker, "router": {"podTemplate": {}}}
    cluster.apply(idle_service("steady", namespace, disaggregation="Always", **roles))
    wait_for(lambda: condition(cluster.get("llmservice", "steady", namespace), "Ready") == "True", "the service", 300)

    def address() -> str:
        return f"{cluster.resolve(f'steady-router.{namespace}.svc')}:{HTTP_PORT}"

    with Load(address, tokens=100, concurrency=4) as load:
        settled = time.monotonic() + SETTLE_S
        wait_for(lambda: time.monotonic() > settled, "the load to be steady", SETTLE_S + 60, poll_s=1.0)
        mark, started = cluster.audit.mark(), time.monotonic()
        wait_for(lambda: time.monotonic() > started + STEADY_S, "the time to pass", STEADY_S + 60, poll_s=1.0)
    writes = [event for event in by_the_operator(cluster, chart, mark) if event.namespace == namespace]
    kinds = Counter(f"{event.verb} {event.kind}" for event in writes)
    print(f"{STEADY_S:.0f} s, {len(load.streams)} streams; writes of the operator: {dict(kinds)}")
    assert not [stream for stream in load.streams if stream.failed]
    assert {event.kind for event in writes} <= {STATUS}
    times = [event.received_s for event in writes]
    assert all(later - earlier > STATUS_EVERY_S - CLOCK_S for earlier, later in pairwise(times)), times
    # By whomever: what an operator does in vain shows as the work of controllers, too. The kubelet repeats itself.
    others = [event for event in cluster.audit.events(mark, namespace=namespace) if event.is_write]
    others = [event for event in others if (event.user, event.kind) != (f"system:node:{cluster.node}", "pods/status")]
    assert {(event.user, event.verb, event.kind, event.name) for event in others if event.kind != STATUS} == set()


def test_two_hundred_services_come_to_rest(own_cluster: Cluster, chart: Chart) -> None:
    cluster = own_cluster
    fake_node(cluster)
    names = [(f"{MANY}{index % NUM_NAMESPACES}", f"svc-{index}") for index in range(NUM_SERVICES)]
    for space in sorted({space for space, _ in names}):
        cluster.kubectl("create", "namespace", space)
    started = time.monotonic()
    fake = {role: {"replicas": 1, "podTemplate": {"spec": FAKE}} for role in ("prefill", "decode", "router")}
    cluster.apply(*(idle_service(name, space, **fake) for space, name in names))
    try:
        wait_for(lambda: at_rest(cluster), "200 services to be at rest", MANY_DEADLINE_S, poll_s=10.0)
        reached = time.monotonic() - started
        wait_quiet(cluster, chart)
        usage = Usage.of(cluster, chart.leader(), chart.namespace)
        mark = cluster.audit.mark()
        later = usage.after(QUIET_S)
        print(
            f"{NUM_SERVICES} services at rest after {reached:.0f} s; idle operator: {later.memory_bytes >> 20} MiB, "
            f"{later.cores:.3f} cores"
        )
        assert [event for event in by_the_operator(cluster, chart, mark) if event.namespace.startswith(MANY)] == []
        assert later.memory_bytes < MAX_MEMORY_BYTES
        assert later.cores < MAX_CORES
    finally:
        for space in sorted({space for space, _ in names}):
            cluster.kubectl("delete", "namespace", space, "--wait=false")


def wait_quiet(cluster: Cluster, chart: Chart) -> None:
    """Until the operator has written nothing for QUIET_S."""
    seen, last = cluster.audit.mark(), time.time()

    def quiet() -> bool:
        nonlocal seen, last
        position = cluster.audit.mark()
        writes = by_the_operator(cluster, chart, seen)
        last = max((event.ended_s for event in writes if event.namespace.startswith(MANY)), default=last)
        seen = position
        return time.time() - last > QUIET_S

    wait_for(quiet, "a minute without a write", MANY_DEADLINE_S, poll_s=3.0)


def at_rest(cluster: Cluster) -> bool:
    """Children at their generation and available, and nobody to ask for the state of the fleet."""
    services = [item for item in cluster.items("llmservices") if item["metadata"]["namespace"].startswith(MANY)]
    deployments = [item for item in cluster.items("deployments") if item["metadata"]["namespace"].startswith(MANY)]
    assert len(services) == NUM_SERVICES
    for item in services:
        status = item.get("status", {})
        name = item["metadata"]["name"]
        assert status.get("observedGeneration") == item["metadata"]["generation"], f"{name}: not seen"
        path: dict[str, str] = next((part for part in status["conditions"] if part["type"] == "KVPathReady"), {})
        found = (path.get("status"), path.get("reason"))
        assert found == ("Unknown", "FleetUnreachable"), f"{name}: {found}"
    assert len(deployments) == 3 * NUM_SERVICES, f"{len(deployments)} Deployments"
    for item in deployments:
        assert item["status"].get("observedGeneration") == item["metadata"]["generation"]
        assert condition(item, "Available") == "True", f"{item['metadata']['name']} is not available"
    return True


def test_idle_operators_are_small(cluster: Cluster, chart: Chart, namespace: str) -> None:
    """Of one service, for comparison with many."""
    cluster.apply(idle_service("one", namespace))
    wait_observed(cluster, "one", namespace)
    usage = Usage.of(cluster, chart.leader(), chart.namespace).after(20)
    print(f"one service: {usage.memory_bytes >> 20} MiB, {usage.cores:.3f} cores")
    assert usage.memory_bytes < MAX_MEMORY_BYTES
