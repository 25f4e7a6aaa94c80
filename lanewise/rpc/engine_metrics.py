"""`/metrics` of a worker: what its engine thread last said, for Prometheus.

Owns: the `lanewise_engine_*` metrics and the small HTTP server. They have a prefix of their own, since every router
repeats the numbers of every worker it knows as `lanewise_worker_*`. Must not: ask the engine anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lanewise.errors import ConfigError
from lanewise.fleet import WorkerIdentity, WorkerStats

_GAUGES = tuple(field.name for field in dataclasses.fields(WorkerStats) if field.type in ("int", "float", "bool"))
_TOTALS = {"preemptions"}  # of the numbers above, those that only grow


class HasStats(Protocol):
    @property
    def stats(self) -> WorkerStats: ...


class _Engine(Collector):
    def __init__(self, identity: WorkerIdentity, source: HasStats) -> None:
        self._identity = identity
        self._source = source

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats, identity = self._source.stats, self._identity
        facts = {name: getattr(identity, name) for name in ("name", "incarnation", "model", "device", "fingerprint")}
        yield InfoMetricFamily("lanewise_engine", "who this is", {"role": identity.role.value, **facts})
        for name in _GAUGES:
            family = CounterMetricFamily if name in _TOTALS else GaugeMetricFamily
            yield family(f"lanewise_engine_{name}", "as the engine last reported it", float(getattr(stats, name)))
        for name, value in stats.counters.items():
            yield CounterMetricFamily(f"lanewise_engine_kv_{name}", "total of the KV channel", value)
        links = GaugeMetricFamily("lanewise_engine_links", "KV links by state", labels=("state",))
        for state in sorted({link.state.value for link in stats.links}):
            links.add_metric([state], sum(link.state.value == state for link in stats.links))
        yield links


def serve_metrics(address: str, identity: WorkerIdentity, source: HasStats) -> Callable[[], None]:
    """Answers from a thread of its own until the returned function is called. An empty address: nothing is served."""
    if not address:
        return _nothing
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"metrics: {address!r} is not host:port")
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(_Engine(identity, source))
    try:
        server, thread = start_http_server(int(port), host or "0.0.0.0", registry)
    except OSError as error:
        raise ConfigError(f"metrics: cannot listen on {address}: {error}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5.0)

    return stop


def _nothing() -> None:
    pass
