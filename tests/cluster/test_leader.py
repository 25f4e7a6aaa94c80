"""Two operators, one of them writes: proven from the audit log while the leader is stopped and resumed."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterable

from tests.cluster.idle import idle_service, wait_observed
from tests.cluster.kube.audit import Event, service_account
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.tools import CommandFailed, wait_for

STOPPED_S = 30.0
MAX_TAKEOVER_S = 20.0
LEASE_S = 10.0
EDIT_EVERY_S = 1.0
SERVICE = "edited"


def test_a_stopped_leader_writes_nothing_outside_its_tenure(own_cluster: Cluster, chart: Chart, namespace: str) -> None:
    cluster = own_cluster
    cluster.apply(idle_service(SERVICE, namespace))
    wait_observed(cluster, SERVICE, namespace)
    mark, old = cluster.audit.mark(), wait_for(chart.leader, "a leader", 30)
    stopped = time.time()
    cluster.signal_pod(old, chart.namespace, signal.SIGSTOP)
    edits = itertools.cycle((2, 1))
    try:
        while time.time() < stopped + STOPPED_S:
            edit(cluster, namespace, next(edits))
            time.sleep(EDIT_EVERY_S)
    finally:
        cluster.signal_pod(old, chart.namespace, signal.SIGCONT)
    resumed = time.time()
    while time.time() < resumed + LEASE_S:
        edit(cluster, namespace, next(edits))
        time.sleep(EDIT_EVERY_S)
    wait_observed(cluster, SERVICE, namespace)
    events = list(cluster.audit.events(mark, user=service_account(chart.namespace, chart.name)))
    writes = [event for event in events if event.is_write]
    renewed = next(index for index, event in enumerate(writes) if event.resource == "leases")
    writes = writes[renewed:]  # nothing is known of the Lease before
    taken = [event for event in writes if event.resource == "leases" and event.pod != old]
    assert taken, "nobody took over"
    authors = {event.pod for event in writes}
    print(f"takeover after {taken[0].ended_s - stopped:.1f} s, {len(writes)} writes by {len(authors)} pods")
    assert taken[0].ended_s - stopped <= MAX_TAKEOVER_S
    assert [event for event in writes if event.resource != "leases" and event.pod != old], "the new leader did nothing"
    assert outside_tenure(writes) == []


def edit(cluster: Cluster, namespace: str, replicas: int) -> None:
    patch = f'{{"spec": {{"decode": {{"replicas": {replicas}}}}}}}'
    cluster.kubectl("patch", "llmservice", SERVICE, "-n", namespace, "--type=merge", "-p", patch)


def outside_tenure(writes: Iterable[Event]) -> list[Event]:
    """Writes whose author did not hold the Lease from their arrival to their end.

    A pod holds it from the end of its Lease write to the arrival of another pod's, and for LEASE_S after its last.
    """
    leases = sorted((event for event in writes if event.resource == "leases"), key=lambda event: event.ended_s)
    found = []
    for event in (event for event in writes if event.resource != "leases"):
        own = [lease for lease in leases if lease.pod == event.pod and lease.ended_s <= event.received_s]
        taken = [
            lease
            for lease in leases
            if lease.pod != event.pod and own and own[-1].ended_s < lease.received_s < event.ended_s
        ]
        if not own or taken or event.ended_s > own[-1].ended_s + LEASE_S:
            found.append(event)
    return found


def test_a_standby_takes_over_when_the_leader_is_gone(cluster: Cluster, chart: Chart) -> None:
    old = wait_for(chart.leader, "a leader", 30)
    started = time.monotonic()
    cluster.kubectl("delete", "pod", old, "-n", chart.namespace, "--grace-period=0", "--force")
    wait_for(lambda: chart.leader() not in ("", old), "another leader", MAX_TAKEOVER_S)
    print(f"another leader after {time.monotonic() - started:.1f} s")


def test_a_leader_that_is_asked_to_leave_hands_over_at_once(cluster: Cluster, chart: Chart) -> None:
    old = wait_for(chart.leader, "a leader", 30)
    wait_for(lambda: len(cluster.pods(chart.namespace, chart.selector, ready=True)) == 2, "a standby", 60)
    started = time.monotonic()
    cluster.kubectl("delete", "pod", old, "-n", chart.namespace, "--wait=false")
    wait_for(lambda: chart.leader() not in ("", old), "another leader", LEASE_S - 2)
    print(f"another leader after {time.monotonic() - started:.1f} s")
    wait_for(lambda: gone(cluster, old, chart.namespace), f"{old} to leave", 30)


def gone(cluster: Cluster, pod: str, namespace: str) -> bool:
    try:
        return cluster.find("pod", pod, namespace) is None
    except CommandFailed:
        return False
