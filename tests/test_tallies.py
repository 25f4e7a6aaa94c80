"""The cheap metrics say the same as prometheus_client's own."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from lanewise.telemetry import LATENCY_BUCKETS_S, Metrics


def test_exported_as_the_library_does() -> None:
    ours, theirs = Metrics("x"), CollectorRegistry()
    tally, spread = ours.tally("things", "how many"), ours.spread("wait", "how long")
    counter = Counter("x_things", "how many", registry=theirs)
    histogram = Histogram("x_wait_seconds", "how long", buckets=LATENCY_BUCKETS_S, registry=theirs)
    for amount in (1, 0, 41):
        tally.inc(amount)
        counter.inc(amount)
    for seconds in (0.0, 0.001, 0.0011, 0.4, 0.8, 599.0, 600.0, 601.0):
        spread.observe(seconds)
        histogram.observe(seconds)

    def lines(registry: CollectorRegistry) -> list[str]:
        return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]

    assert lines(ours.registry) == lines(theirs)


def test_a_tally_only_grows() -> None:
    with pytest.raises(ValueError, match="x_things only grows; got -1"):
        Metrics("x").tally("things", "how many").inc(-1)
