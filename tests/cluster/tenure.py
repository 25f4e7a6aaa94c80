"""Who led when, read from the audit log: no write may lie outside its author's tenure.

Owns: the rule. Must not: know how an operator keeps to it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from tests.cluster.kube.audit import Event

LEASE_S = 10.0


def since_the_first_renewal(events: Iterable[Event], lease: str) -> list[Event]:
    """Writes of one operator's account; those before the first of its Lease are left out: nobody can tell who led."""
    writes = [event for event in events if event.is_write]
    first = next((index for index, event in enumerate(writes) if is_renewal(event, lease)), len(writes))
    return writes[first:]


def is_renewal(event: Event, lease: str) -> bool:
    """A write of the Lease that makes a leader; the markers of namespaces are writes like any other."""
    return event.resource == "leases" and event.name == lease


def outside_tenure(writes: Iterable[Event], lease: str) -> list[Event]:
    """Writes whose author did not hold the Lease from their arrival to their end.

    A pod holds it from the end of its Lease write to the arrival of another pod's, and for LEASE_S after its last.
    """
    writes = list(writes)
    renewals = [event for event in writes if is_renewal(event, lease)]
    by_end = sorted(renewals, key=_ended)
    by_arrival = sorted(renewals, key=_received)
    own: dict[str, list[Event]] = {}
    for event in by_end:
        own.setdefault(event.pod, []).append(event)
    found = []
    for event in (event for event in writes if not is_renewal(event, lease)):
        before = own.get(event.pod, [])
        before = before[: bisect_right(before, event.received_s, key=_ended)]
        if not before or event.ended_s > before[-1].ended_s + LEASE_S:
            found.append(event)
            continue
        first = bisect_right(by_arrival, before[-1].ended_s, key=_received)
        last = bisect_left(by_arrival, event.ended_s, key=_received)
        if any(other.pod != event.pod for other in by_arrival[first:last]):
            found.append(event)
    return found


def _ended(event: Event) -> float:
    return event.ended_s


def _received(event: Event) -> float:
    return event.received_s
