"""A namespaced operator beside the cluster-wide one: until the latter has seen the marker, both look after it.

Owns: waiting for that moment, read from the audit log. Must not: know what either of them does.
"""

from __future__ import annotations

from tests.cluster.kube.audit import service_account
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.tools import wait_for

MARKER = "lanewise-namespace"
DEADLINE_S = 90


def wait_left_alone(wide: Chart, namespace: str) -> None:
    """Returns when the cluster-wide release has looked at the markers after the one of `namespace` was there."""
    cluster, user = wide.cluster, service_account(wide.namespace, wide.name)

    def marked_at() -> float | None:
        marks = cluster.audit.events(resource="leases", namespace=namespace)
        return min((event.ended_s for event in marks if event.name == MARKER), default=None)

    marked = wait_for(marked_at, f"the marker of {namespace}", DEADLINE_S, poll_s=0.5)

    def left_alone() -> bool:
        looks = cluster.audit.events(user=user, verbs=["list"], resource="leases")
        return any(event.received_s > marked for event in looks)

    wait_for(left_alone, f"the cluster-wide operator to leave {namespace}", DEADLINE_S, poll_s=0.5)
