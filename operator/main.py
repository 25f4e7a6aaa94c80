"""The operator process: wait for the Lease, then watch and reconcile until it is lost or a signal comes.

Owns: start and stop order. A lost Lease ends the process with status 3 within 2 s, whatever hangs; SIGTERM stops
watching and working first and releases the Lease last. Must not: hold logic of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from lanewise.config import OperatorConfig, parse_config
from lanewise.errors import ConfigError
from lanewise.operator.cluster import ApiError, Cluster, Unavailable
from lanewise.operator.fleet import FleetClient
from lanewise.operator.handlers import Watcher
from lanewise.operator.kinds import KINDS, Kind
from lanewise.operator.leader import Elector, LeaseTimes, LostLease
from lanewise.operator.observed import Key, Store
from lanewise.operator.queue import WorkQueue
from lanewise.operator.reconcile import Reconciler
from lanewise.operator.runtime import own_runtime
from lanewise.operator.scaling_loop import scale
from lanewise.operator.scope import Scope
from lanewise.operator.web import Web
from lanewise.telemetry import Metrics, setup_logging

EXIT_USAGE, EXIT_LOST = 2, 3
LOST_S = 1.5  # from the loss of the Lease to the end of the process, at most
SKIPPED_S = 60.0
DEFINITION_S = 1.0

log = structlog.get_logger(__name__)


def main() -> None:
    try:
        config = parse_config(OperatorConfig)
        if not config.control_image or not config.worker_image:
            raise ConfigError("control_image and worker_image: required, the images that pods are made of")
        config = config.model_copy(update={"pod_name": config.pod_name or socket.gethostname()})
        setup_logging("operator", config.pod_name, log_format=config.log_format, log_level=config.log_level)
        sys.exit(asyncio.run(Operator(config).run()))
    except ConfigError as error:
        print(f"lanewise-operator: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


@dataclass(slots=True)
class Leading:
    """What the leader has: the seam for further reconcilers (operator/scaling_*.py), see LEADER_TASKS."""

    config: OperatorConfig
    cluster: Cluster
    store: Store
    queue: WorkQueue[Key]
    fleet: FleetClient
    reconciler: Reconciler
    metrics: Metrics
    sinks: dict[str, Callable[[dict[str, Any], bool], None]] = field(default_factory=dict)
    """By watched extra kind: called with (body, deleted) for each event."""


EXTRA_KINDS: dict[str, Kind] = {"ScalingPolicy": KINDS["ScalingPolicy"]}
"""Further kinds to watch, by kind. Events go to `Leading.sinks`."""
LEADER_TASKS: list[Callable[[Leading], Awaitable[None]]] = [scale]
"""Run as tasks while this process leads, and cancelled when it stops. They write through `Leading.cluster` only."""


class Operator:
    """One process; `run()` returns its exit status."""

    def __init__(self, config: OperatorConfig) -> None:
        self._config = config
        self._metrics = Metrics("lanewise_operator")
        self._leads = self._metrics.gauge("leader", "1 while this process holds the Lease.")
        self._looks = self._metrics.latency("reconcile", "Time of one look at one service.")
        self._failed = self._metrics.counter("reconcile_failures_total", "Looks that ended in an error.")
        self._waiting = self._metrics.gauge("queue_length", "Services that wait to be looked at.")
        self.cluster = Cluster(config, self._metrics)
        self.store = Store()
        self._stop = asyncio.Event()
        self._web = Web(config.http, self._metrics.registry, lambda: self.cluster.last_answer)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        await self.cluster.open()
        await self._web.start()
        config = self._config
        times = LeaseTimes(config.lease_duration_s, config.renew_deadline_s, config.retry_period_s)
        namespace = config.lease_namespace or config.pod_namespace
        elector = Elector(self.cluster, namespace, config.lease_name, config.pod_name, times)
        try:
            if not await self._until_stop(elector.acquire()):
                return 0
            self._leads.set(1)
            return await self._lead(elector)
        finally:
            self._leads.set(0)
            await self._web.stop()
            await self.cluster.close()

    async def _until_stop(self, work: Any) -> bool:
        """Whether `work` ended before a signal came."""
        task, stop = asyncio.ensure_future(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            return bool(task.done())
        finally:
            for waiter in (task, stop):
                waiter.cancel()

    async def _lead(self, elector: Elector) -> int:
        leading = self._leading()
        scope = Scope(self.cluster, self._config.namespaces, elector.identity, lambda _: self._wake_all(leading))
        watcher = Watcher(self._config, lambda *news: self._on_event(leading, *news), EXTRA_KINDS)
        hold = asyncio.create_task(elector.hold(), name="lease")
        tasks = [hold, asyncio.create_task(scope.run()), asyncio.create_task(self._watch(watcher))]
        tasks.append(asyncio.create_task(leading.queue.run(lambda key: self._look(leading, scope, key), self._workers)))
        tasks += [asyncio.ensure_future(task(leading)) for task in LEADER_TASKS]
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.done():
                watcher.abandon()
                return self._fall(next(task for task in tasks if task.done()))
            log.info("stopping")
            await watcher.stop()
            await _cancel(tasks[1:])
            await self.cluster.quiet()  # what is being written now is written under the Lease
            await _cancel([hold])
            await elector.release()
            return 0
        finally:
            await _cancel([*tasks, stop])

    async def _watch(self, watcher: Watcher) -> None:
        """Returns when the watches have ended by themselves. kopf never learns of kinds that come after its start."""
        for kind in ("LLMService", *EXTRA_KINDS):
            while not await self._serves(kind):
                log.warning("waiting_for_definition", kind=kind)
                await asyncio.sleep(DEFINITION_S)
        watcher.start()
        await watcher.failed.wait()

    async def _serves(self, kind: str) -> bool:
        try:
            return await self.cluster.has_kind(kind)
        except (ApiError, Unavailable):
            return False

    @property
    def _workers(self) -> int:
        return self._config.concurrency

    def _fall(self, task: asyncio.Task[Any]) -> int:
        """Something that must not end has ended. Another process takes over; this one is gone in LOST_S."""
        error = task.exception() if not task.cancelled() else None
        what = "lease_lost" if isinstance(error, LostLease) else "operator_failed"
        log.error(what, error=f"{type(error).__name__}: {error}" if error else "the watcher or a task ended")
        self.cluster.fence.deadline = 0.0
        last_resort = threading.Timer(LOST_S, os._exit, (EXIT_LOST,))
        last_resort.daemon = True
        last_resort.start()
        return EXIT_LOST

    def _leading(self) -> Leading:
        config, fleet = self._config, FleetClient()
        own = own_runtime(config.control_image, config.worker_image)
        queue: WorkQueue[Key] = WorkQueue()
        reconciler = Reconciler(config, own, self.cluster, self.store, fleet, queue.add)
        return Leading(config, self.cluster, self.store, queue, fleet, reconciler, self._metrics)

    def _wake_all(self, leading: Leading) -> None:
        for key in self.store.known_services():
            leading.queue.add(key)

    def _on_event(self, leading: Leading, kind: str, body: dict[str, Any], deleted: bool, initial: bool) -> None:
        if kind in EXTRA_KINDS:
            if kind in leading.sinks:
                leading.sinks[kind](body, deleted)
            return
        key = self.store.service(body, deleted) if kind == "LLMService" else self.store.child(body, deleted)
        if key is None:
            return
        if initial:
            self.store.stale(key)
        leading.queue.add(key)
        self._waiting.set(len(leading.queue))

    async def _look(self, leading: Leading, scope: Scope, key: Key) -> float | None:
        if scope.skips(key[0]):
            return SKIPPED_S
        started = time.monotonic()
        try:
            return await leading.reconciler.look(key)
        except Exception:
            self._failed.inc()
            raise
        finally:
            self._looks.observe(time.monotonic() - started)
            self._waiting.set(len(leading.queue))


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
