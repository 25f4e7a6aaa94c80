"""The router's Prometheus metrics.

Owns: every `lanewise_*` metric of a router, and the gauges that repeat each worker's last statistics at scrape time.
Must not: influence a decision.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lanewise.fleet import WorkerIdentity, WorkerStats
from lanewise.policy.scaling_meter import DemandMeter
from lanewise.request import Submission
from lanewise.router.discovery import Freshness
from lanewise.router.ledger import Ledger
from lanewise.router.session import Session
from lanewise.telemetry import Metrics

_STATS_GAUGES = tuple(field.name for field in dataclasses.fields(WorkerStats) if field.type in ("int", "float", "bool"))
_COUNTERS = (
    ("kv_bytes", "bytes of KV moved, by direction", "direction", {"bytes_sent": "sent", "bytes_received": "received"}),
    (
        "transfers",
        "KV transfers by how they ended",
        "outcome",
        {name: name for name in ("delivered", "committed", "aborted", "busy", "refused")},
    ),
)
_LABELS = ("worker", "role", "incarnation")


class RouterMetrics:
    def __init__(self, demand: DemandMeter) -> None:
        make = Metrics("lanewise")
        self.demand = demand
        self.registry: CollectorRegistry = make.registry
        self.ttft = make.spread("ttft", "arrival at the router to the first token")
        self.tpot = make.spread("tpot", "mean time per output token after the first, by request")
        self.e2e = make.spread("e2e", "arrival at the router to the end of the request")
        self.finished = make.counter(
            "requests", "requests by how they ended: stop, length, or an error code", ("outcome",)
        )
        self.arrivals = make.tally("arrivals", "requests accepted")
        self.prompt_tokens = make.tally("prompt_tokens", "prompt tokens of accepted requests")
        self.output_tokens = make.tally("output_tokens", "tokens forwarded to clients")
        self.hit_tokens = make.tally("prefix_hit_tokens", "prompt tokens the chosen worker had cached")
        self.failovers = make.counter("failovers", "attempts after the first", ("cause",))
        self.held = make.gauge("held_requests", "requests that wait for workers")
        self.running = make.gauge("running_requests", "requests that have not ended")
        self.http = make.counter("http_responses", "HTTP responses by status", ("status",))

    def placed(self, submission: Submission, cached_tokens: int, came_back: bool) -> None:
        """A prompt was sent to a worker that holds this much of it. `came_back`: it was refused before."""
        self.hit_tokens.inc(cached_tokens)
        self.demand.placed(submission.request_id, len(submission.prompt_ids), cached_tokens, came_back)

    def token(self) -> None:
        """A token was forwarded."""
        self.output_tokens.inc()
        self.demand.token()

    def ended(self, request_id: str, outcome: str, e2e_s: float, ttft_s: float | None, tpot_s: float | None) -> None:
        """One request has ended."""
        self.demand.ended(request_id, ttft_s, tpot_s)
        self.finished.labels(outcome).inc()
        self.e2e.observe(e2e_s)
        if tpot_s is not None:
            self.tpot.observe(tpot_s)

    def watch(
        self, sessions: Callable[[], Iterable[Session]], ledger: Ledger, freshness: Callable[[], Freshness]
    ) -> None:
        """What is read at a scrape, where the parts keep it."""
        self.registry.register(_Fleet(sessions))
        self.registry.register(_Own(ledger, freshness))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Own(Collector):
    """The plain numbers of this router."""

    def __init__(self, ledger: Ledger, freshness: Callable[[], Freshness]) -> None:
        self._ledger = ledger
        self._freshness = freshness

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        ledger, fresh = self._ledger, self._freshness()
        for name, help_text, value in (
            ("kv_transfers", "attempts whose KV came over the KV channel and was committed", ledger.kv_transfers),
            ("requests_resumed", "attempts that continued a stream on another pair", ledger.resumed),
            ("requests_held", "requests that waited for a worker pair at least once", ledger.held),
            ("handovers", "attempts moved because their worker drained", ledger.handovers),
        ):
            yield CounterMetricFamily(f"lanewise_{name}", help_text, value)
        yield GaugeMetricFamily("lanewise_discovery_synced", "1: the view of the workers is complete", fresh.synced)
        stale_s = fresh.stale_s(time.monotonic())
        yield GaugeMetricFamily("lanewise_discovery_stale_seconds", "since the source was last heard", stale_s)
        ttft = GaugeMetricFamily("lanewise_prefill_ttft_seconds", "recent means by way", labels=("way", "kind"))
        for way, numbers in (("remote", ledger.remote), ("local", ledger.local)):
            if numbers.requests:
                for kind, seconds in zip(("measured", "predicted", "other_way"), numbers.means, strict=True):
                    ttft.add_metric([way, kind], seconds)
        yield ttft


class _Fleet(Collector):
    """One gauge per numeric field of WorkerStats, labelled by worker."""

    def __init__(self, sessions: Callable[[], Iterable[Session]]) -> None:
        self._sessions = sessions

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        sessions = [(s, s.identity) for s in self._sessions() if s.identity is not None]
        labels = {id(s): [i.name, i.role.value, i.incarnation] for s, i in sessions}
        for name in _STATS_GAUGES:
            family = GaugeMetricFamily(f"lanewise_worker_{name}", "as the worker last reported it", labels=_LABELS)
            for session, _ in sessions:
                family.add_metric(labels[id(session)], float(getattr(session.stats, name)))
            yield family
        yield from self._counters(sessions, labels)
        inflight = GaugeMetricFamily("lanewise_worker_inflight_requests", "sent by this router", labels=_LABELS)
        age = GaugeMetricFamily("lanewise_worker_stats_age_s", "age of the last statistics", labels=_LABELS)
        for session, _ in sessions:
            inflight.add_metric(labels[id(session)], len(session.carried))
            age.add_metric(labels[id(session)], time.monotonic() - session.stats_at if session.stats_at else 0.0)
        yield inflight
        yield age

    @staticmethod
    def _counters(
        sessions: list[tuple[Session, WorkerIdentity]], labels: dict[int, list[str]]
    ) -> Iterator[CounterMetricFamily]:
        for name, help_text, label, fields in _COUNTERS:
            family = CounterMetricFamily(f"lanewise_{name}", help_text, labels=(*_LABELS, label))
            for session, _ in sessions:
                for field, value in fields.items():
                    if field in session.stats.counters:
                        family.add_metric([*labels[id(session)], value], session.stats.counters[field])
            yield family
