"""The verdict on a campaign: outcomes, recovery times, the table and the JSON. Pure.

Recovery of a fault: from its hit, or the end of the pause it caused, to the next token (or end) of the slowest request
that it affected. A lost or damaged message of a transfer affects the request of that transfer, and its first token does
not count as the next: it does not come by the KV channel. Any other fault counts for all requests that were under way,
so overlapping ones are counted against each other: an upper bound.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Column, Table

from lanewise.chaos.inject import Hit
from lanewise.chaos.traffic import Trip

MAX_RECOVERY_S = 10.0
IN_FLIGHT_S = 0.05
"""A token that comes this soon after a fault had left before it; it is no sign of recovery."""
_FINE = ("ok", "cancelled")


def recovery_s(hit: Hit, trips: Sequence[Trip]) -> float:
    return max((seconds for seconds, _ in recoveries(hit, trips)), default=0.0)


def recoveries(hit: Hit, trips: Sequence[Trip]) -> list[tuple[float, Trip]]:
    """Of each request that counts as affected: seconds to its next token."""
    under_way = [t for t in trips if t.started <= hit.at < t.ended and t.outcome != "cancelled"]
    if hit.request:
        under_way = [trip for trip in under_way if trip.request_id == hit.request]
    first = 1 if hit.request else 0
    return [(max(0.0, trip.next_after(hit.at + IN_FLIGHT_S, first) - hit.resumed_at), trip) for trip in under_way]


def slowest(hits: Sequence[Hit], trips: Sequence[Trip], count: int) -> list[tuple[Hit, Trip, float]]:
    """The requests that took longest to go on, each with the first fault that it was late for."""
    found: dict[int, tuple[Hit, Trip, float]] = {}
    for hit in sorted(hits, key=lambda hit: hit.at):
        for seconds, trip in recoveries(hit, trips):
            if trip.number not in found or seconds > found[trip.number][2]:
                found[trip.number] = (hit, trip, seconds)
    return sorted(found.values(), key=lambda each: -each[2])[:count]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def summarise(
    trips: Sequence[Trip],
    hits: Sequence[Hit],
    leaked_blocks: int,
    unreachable: Sequence[str],
    seed: int,
    stories: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    outcomes = Counter(trip.outcome for trip in trips)
    times = [recovery_s(hit, trips) for hit in hits]
    states: dict[str, Counter[str]] = defaultdict(Counter)
    for hit in hits:
        states[hit.fault.state][hit.fault.kind] += 1
    return {
        "seed": seed,
        "requests": len(trips),
        "faults": len(hits),
        "wrong": outcomes["wrong"],
        "hung": outcomes["hung"],
        "failed": sum(count for outcome, count in outcomes.items() if outcome not in (*_FINE, "wrong", "hung")),
        "cancelled": outcomes["cancelled"],
        "leaked_blocks": leaked_blocks,
        "recovery_p50_s": round(percentile(times, 0.5), 3),
        "recovery_p99_s": round(percentile(times, 0.99), 3),
        "recovery_max_s": round(max(times, default=0.0), 3),
        "kinds": dict(Counter(hit.fault.kind for hit in hits)),
        "hits": {state: dict(counts) for state, counts in sorted(states.items())},
        "abandoned": dict(Counter(unreachable)),
        "problems": [asdict(trip) for trip in trips if trip.outcome not in _FINE],
        "slowest": list(stories),
        "lines": [
            {
                **asdict(hit.fault),
                "request": hit.request,
                "at": hit.at,
                "resumed_at": hit.resumed_at,
                "recovery_s": round(taken, 4),
            }
            for hit, taken in zip(hits, times, strict=True)
        ],
    }


def passed(report: dict[str, Any]) -> bool:
    clean = not any(report[name] for name in ("wrong", "hung", "failed", "leaked_blocks", "abandoned"))
    return clean and report["recovery_p99_s"] <= MAX_RECOVERY_S


def tables(report: dict[str, Any]) -> list[Table]:
    kinds = list(report["kinds"])
    by_state = Table(Column("state", no_wrap=True), *kinds, box=SIMPLE, title="faults seen to hit, by state and kind")
    for state, counts in report["hits"].items():
        by_state.add_row(state, *(str(counts.get(kind, "")) for kind in kinds))
    by_state.add_row("all", *(str(count) for count in report["kinds"].values()))
    times = Table("kind", "faults", "recovery p50 s", "p99 s", "max s", box=SIMPLE, title="recovery")
    for kind in kinds:
        values = [line["recovery_s"] for line in report["lines"] if line["kind"] == kind]
        figures = (percentile(values, 0.5), percentile(values, 0.99), max(values))
        times.add_row(kind, str(len(values)), *(f"{value:.2f}" for value in figures))
    return [by_state, times]
