"""Two operators, one of them writes: proven from the audit log while the leader is stopped and resumed."""

from __future__ import annotations

import itertools
import signal
import time

from tests.cluster.idle import idle_service, wait_observed
from tests.cluster.kube.audit import service_account
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.tools import CommandFailed, wait_for
from tests.cluster.tenure import LEASE_S, outside_tenure, since_the_first_renewal

STOPPED_S = 30.0
MAX_TAKEOVER_S = 20.0
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
    user = service_account(chart.namespace, chart.name)
    writes = since_the_first_renewal(cluster.audit.events(mark, user=user), chart.name)
    taken = [event for event in writes if event.resource == "leases" and event.pod != old]
    assert taken, "nobody took over"
    authors = {event.pod for event in writes}
    print(f"takeover after {taken[0].ended_s - stopped:.1f} s, {len(writes)} writes by {len(authors)} pods")
    assert taken[0].ended_s - stopped <= MAX_TAKEOVER_S
    assert [event for event in writes if event.resource != "leases" and event.pod != old], "the new leader did nothing"
    assert outside_tenure(writes, chart.name) == []


def edit(cluster: Cluster, namespace: str, replicas: int) -> None:
    patch = f'{{"spec": {{"decode": {{"replicas": {replicas}}}}}}}'
    cluster.kubectl("patch", "llmservice", SERVICE, "-n", namespace, "--type=merge", "-p", patch)


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
