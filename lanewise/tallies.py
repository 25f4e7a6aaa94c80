"""Counters and histograms that one thread fills on its way: an addition each, exported when somebody scrapes.

prometheus_client's own take a lock and a dozen calls, which a request pays for while its caches are cold
(docs/measured.md). Owns: that, for metrics without labels. Must not: be shared by threads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector


class Tally(Collector):
    """A counter."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name, self._help = name, help_text
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Raises ValueError for a negative amount."""
        if amount < 0:
            raise ValueError(f"{self._name} only grows; got {amount}")
        self.value += amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._help, value=self.value)


class Spread(Collector):
    """A histogram over ascending bucket limits."""

    def __init__(self, name: str, help_text: str, limits: Sequence[float]) -> None:
        self._name, self._help = name, help_text
        self._limits = tuple(limits)
        self._counts = [0] * (len(self._limits) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._limits, value)] += 1  # a value at a limit belongs below it
        self.total += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        seen = 0
        buckets: list[tuple[str, float]] = []
        for limit, count in zip((*self._limits, float("inf")), self._counts, strict=True):
            seen += count
            buckets.append(("+Inf" if limit == float("inf") else str(limit), seen))
        yield HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=self.total)
