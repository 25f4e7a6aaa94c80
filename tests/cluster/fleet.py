"""A service's own counters, read from every router pod, those that are gone included.

Owns: the sum over pods that come and go. Must not: judge it.
"""

from __future__ import annotations

import threading
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPException
from types import TracebackType
from urllib.parse import quote

from tests.cluster.kube.cluster import Cluster
from tests.cluster.raw_api import RawApi

POLL_S = 0.5
HTTP_PORT = 8000
TRANSFERS = "lanewise_kv_transfers_total"
RESUMED = "lanewise_requests_resumed_total"
HELD = "lanewise_requests_held_total"
OUTCOMES = "lanewise_requests_total"


@dataclass
class Counters:
    """Sums over all routers there have been since the watch began; a pod that is gone counts with its last figures."""

    cluster: Cluster
    namespace: str
    service: str
    last: dict[str, dict[str, float]] = field(default_factory=dict)

    def __enter__(self) -> Counters:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="counters", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30)

    def sums(self) -> Counter[str]:
        self._read_all()
        total: Counter[str] = Counter()
        for figures in list(self.last.values()):
            for name, value in figures.items():
                total[name] += int(value)
        return total

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._read_all()

    def _read_all(self) -> None:
        chosen = quote(f"lanewise.io/service={self.service},app.kubernetes.io/component=router")
        path = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={chosen}"
        try:
            with RawApi(self.cluster.kubeconfig, self.cluster.kubeconfig.parent) as api:
                answer = api.call("GET", path)
        except (HTTPException, OSError):
            return  # the API server is away: the next round will tell
        for pod in answer.body.get("items", ()):
            address = pod["status"].get("podIP")
            figures = scrape(f"{address}:{HTTP_PORT}") if address else None
            if figures is not None:
                self.last[_run(pod)] = figures


def _run(pod: dict[str, dict[str, object]]) -> str:
    """One process of a pod: a restarted container counts from zero again."""
    statuses = pod["status"].get("containerStatuses")
    restarts = statuses[0]["restartCount"] if isinstance(statuses, list) and statuses else 0
    return f"{pod['metadata']['uid']}/{restarts}"


def scrape(address: str) -> dict[str, float] | None:
    """Sums per metric name, and per outcome for the requests; None when the process does not answer."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=2) as reply:
            lines = reply.read().decode().splitlines()
    except OSError:
        return None
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("lanewise_"):
            series, _, value = line.rpartition(" ")
            name, _, labels = series.partition("{")
            key = f"{name}{{{labels}" if name == OUTCOMES else name
            found[key] = found.get(key, 0.0) + float(value)
    return found
