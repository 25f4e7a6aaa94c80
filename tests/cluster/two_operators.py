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

    def left_alone() -> bool:
        events = list(cluster.audit.events(resource="leases"))
        ours = [event.ended_s for event in events if (event.name, event.namespace) == (MARKER, namespace)]
        marked = min(ours, default=float("inf"))
        return any(event.user == user and event.verb == "list" and event.received_s > marked for event in events)

    wait_for(left_alone, f"the cluster-wide operator to leave {namespace}", DEADLINE_S)
