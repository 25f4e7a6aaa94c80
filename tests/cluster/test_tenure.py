"""The whole audit log of a run: leaders killed, stopped, upgraded and uninstalled, and no write outside a tenure.

The last file of the folder: everything the other tests did to operators is in the log by now.
"""

from __future__ import annotations

from dataclasses import replace

from tests.cluster.kube.audit import Event
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster
from tests.cluster.tenure import is_renewal, outside_tenure, since_the_first_renewal

PREFIX = "system:serviceaccount"


def test_no_operator_of_this_run_wrote_outside_its_tenure(own_cluster: Cluster, chart: Chart) -> None:
    """Every release there was, each with the Lease that has the name of its account."""
    assert chart
    by_account: dict[tuple[str, str], list[Event]] = {}
    for event in own_cluster.audit.events():
        prefix, _, account = event.user.rpartition(f"{PREFIX}:")
        namespace, _, name = account.partition(":")
        if not prefix and name:
            by_account.setdefault((namespace, name), []).append(event)
    judged = 0
    for (namespace, name), events in by_account.items():
        writes = since_the_first_renewal(events, name)
        authors = {event.pod for event in writes if not is_renewal(event, name)}
        judged += len(writes)
        if authors:
            print(f"{namespace}/{name}: {len(writes)} writes by {len(authors)} leaders")
        assert "" not in authors, "a request without its pod cannot be judged"
        assert outside_tenure(writes, name) == []
    assert judged > 0


def test_a_write_outside_a_tenure_is_found() -> None:
    """The rule itself, on a log made by hand: a leads from 0 to 8, b from 20 on."""

    def write(pod: str, at: float, resource: str = "deployments") -> Event:
        return replace(BLANK, resource=resource, name="lanewise", received_s=at, ended_s=at + 0.1, extra=_pod(pod))

    leases = [write("a", 0, "leases"), write("a", 8, "leases"), write("b", 20, "leases")]
    good = [write("a", 1), write("a", 17), write("b", 21)]
    bad = [write("b", 5), write("a", 18.05), write("a", 20.5), write("a", 30), write("b", 30.05)]
    assert outside_tenure([*leases, *good], "lanewise") == []
    for event in bad:
        assert outside_tenure([*leases, *good, event], "lanewise") == [event], event.received_s
    straddling = replace(write("a", 17.5), ended_s=20.2)
    soon = [write("a", 0, "leases"), write("a", 17, "leases"), write("b", 20, "leases")]
    assert outside_tenure([*soon, straddling], "lanewise") == [straddling]
    assert since_the_first_renewal([write("a", 0), *leases], "lanewise") == leases


def _pod(name: str) -> dict[str, list[str]]:
    return {"authentication.kubernetes.io/pod-name": [name]}


BLANK = Event("", (), "patch", "", "", "", "", "", 200, 0.0, 0.0, "", "", "", {}, {})
