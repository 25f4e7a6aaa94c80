"""The router process: configuration, both servers, sessions with the workers, drain.

Owns: putting the parts together, start and stop order. Must not: hold logic of its own, or import torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
import uuid
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lanewise.config import RouterConfig, parse_config
from lanewise.errors import ConfigError, ErrorCode, LanewiseError
from lanewise.fleet import Role
from lanewise.policy.cost import CostModel, usual_cost
from lanewise.policy.scaling_meter import DemandMeter
from lanewise.router.auth import ApiKeys
from lanewise.router.catalog import Catalog
from lanewise.router.discovery import peer_discovery, worker_discovery
from lanewise.router.dispatch import Dispatcher
from lanewise.router.fleet_server import FleetService, Self
from lanewise.router.generation import Front
from lanewise.router.grpc_server import InferenceService, add_inference
from lanewise.router.http_server import HttpServer
from lanewise.router.http_wire import BACKLOG, HttpListener
from lanewise.router.keda import ExternalScaler
from lanewise.router.keda_peers import Peers
from lanewise.router.metrics import RouterMetrics
from lanewise.router.roster import Roster
from lanewise.router.session import Timing
from lanewise.rpc import externalscaler_pb2 as es
from lanewise.rpc import externalscaler_pb2_grpc as es_grpc
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from lanewise.rpc.process import die
from lanewise.telemetry import setup_logging

COST_S = 1.0  # between looks at what the workers say a batch takes
FLUSH_S = 5.0  # after the last request has ended: for its last bytes to leave
# The kernel would buffer megabytes for a client that reads nothing, and so hide that it does not.
UNSENT_BYTES = 16 * 1024
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

GC_OBJECTS = 20_000

log = structlog.get_logger(__name__)


def main() -> None:
    try:
        config = parse_config(RouterConfig)
        setup_logging("router", config.name, log_format=config.log_format, log_level=config.log_level)
        uvloop.run(_serve(config))
    except ConfigError as error:
        die(error)


async def _serve(config: RouterConfig) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        """The first asks for a drain, the second ends it."""
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    router = Router(config)
    await router.start()
    gc.collect()
    gc.set_threshold(GC_OBJECTS, 20, 100)  # requests make no cycles to speak of: look for them rarely
    gc.freeze()  # what start-up made lives as long as the process: no collection needs to look at it again
    try:
        await router.run_until(stop)
        await router.drain(hurry)
    finally:
        await router.stop()
    log.info("stopped")


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"{text!r} is not host:port")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # accepted connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return listener


class Router:
    """One router, startable in any event loop (a test runs several in one process)."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.incarnation = str(uuid.uuid4())
        self._keys = ApiKeys(config.api_keys_file)
        self._usual: CostModel | None = None
        self._costed_at = float("-inf")
        self.catalog = Catalog(created=int(time.time()), expected=config.served_name)
        self.discovery = worker_discovery(config)
        self.metrics = RouterMetrics(DemandMeter(config.ttft_target_s, config.tpot_target_s, self._cost))
        timing = Timing(config.ping_interval_s, config.ping_misses)
        self.roster = Roster(self.incarnation, timing, self.catalog, config.worker_tls_dir)
        self.dispatcher = Dispatcher(config, self.roster, self.metrics, self._routable)
        self.roster.listen(self.dispatcher)
        self.metrics.watch(self.roster.sessions, self.dispatcher.ledger, lambda: self.discovery.freshness)
        self.front = Front(config, self.catalog, self.dispatcher)
        self.metrics.held.set_function(lambda: self.front.num_held)
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None
        self._sessions: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None  # instances between lanes
        self.http = Address.parse(config.http)
        self.grpc = Address.parse(config.grpc)

    async def start(self) -> None:
        """Both servers listen, whether there are workers or not."""
        config = self._config
        server = HttpServer(config, self.front, self.catalog, self.dispatcher, self.metrics, self._keys)
        self._http = HttpListener(server.handle, config.max_body_bytes)
        self.http = Address(self.http.host, await self._http.start(_listen(self.http)))
        await self._start_grpc()
        self._sessions = asyncio.create_task(self.roster.run(self.discovery))
        if (lanes := self.dispatcher.placer.lanes) is not None:
            self._moving = asyncio.create_task(lanes.run())
        log.info(
            "ready",
            http=f"http://{self.http}",
            grpc=str(self.grpc),
            workers=list(config.workers or config.worker_services),
            incarnation=self.incarnation,
            pid=os.getpid(),
        )

    async def _start_grpc(self) -> None:
        limit = self._config.max_body_bytes
        options = [("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        inference = InferenceService(self.front, self.catalog, self.dispatcher, self._keys)
        self._fleet = fleet = FleetService(
            Self(self.incarnation, self._config.name),
            self.roster,
            self.dispatcher,
            self.catalog,
            self.discovery,
            self.metrics.demand,
            self.front,
        )
        add_inference(inference, self._server)
        self._peers = Peers(lambda: fleet.Snapshot(pb.FleetRequest(), None), peer_discovery(self._config))
        self._following = asyncio.create_task(self._peers.run())
        # grpcio's generated registration functions carry no types.
        pb_grpc.add_FleetServicer_to_server(fleet, self._server)  # type: ignore[no-untyped-call]
        es_grpc.add_ExternalScalerServicer_to_server(ExternalScaler(self._peers), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = pb.DESCRIPTOR.services_by_name
        names = [services["Inference"].full_name, services["Fleet"].full_name]
        names.append(es.DESCRIPTOR.services_by_name["ExternalScaler"].full_name)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        try:
            port = self._server.add_insecure_port(str(self.grpc))
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self.grpc}: {error}") from error
        self.grpc = Address(self.grpc.host, port)
        await self._set_health(NOT_SERVING)
        await self._server.start()

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until told to stop. A failure of the sessions' owner is a defect and ends the process."""
        assert self._sessions is not None  # start() comes first
        waiter = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({waiter, self._sessions}, return_when=asyncio.FIRST_COMPLETED)
            if self._sessions.done():
                self._sessions.result()
        finally:
            waiter.cancel()

    async def drain(self, hurry: asyncio.Event | None = None) -> None:
        """Refuse what is new, finish what runs: up to drain_max_s, or until `hurry` is set."""
        self.front.draining = self._fleet.draining = True
        await self._set_health(NOT_SERVING)
        self._http.drain()
        # Tells gRPC clients to open their next call on another connection, which a Service leads to another router.
        self._going: asyncio.Task[None] = asyncio.create_task(
            self._server.stop(grace=self._config.drain_max_s + FLUSH_S)
        )
        log.info("draining", running=self.dispatcher.num_running, max_s=self._config.drain_max_s)
        waiters = [asyncio.create_task(event.wait()) for event in (self.dispatcher.idle, hurry) if event is not None]
        await asyncio.wait(waiters, timeout=self._config.drain_max_s, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiters:
            waiter.cancel()
        left = LanewiseError(ErrorCode.DRAINING, "this router stopped before the request was complete")
        self.dispatcher.end_all(left)

    async def stop(self) -> None:
        await self._http.stop(FLUSH_S)
        await self._server.stop(grace=FLUSH_S if self.front.draining else 0)
        for task in (self._sessions, self._health_task, self._following, self._moving):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def _routable(self) -> None:
        models = [model.name for model in self.catalog.models()]
        log.info("routable", models=models, workers=[session.address for session in self.roster.sessions()])
        self._health_task = asyncio.get_running_loop().create_task(self._set_health(SERVING))

    def _cost(self) -> CostModel | None:
        """As the prefill workers have it (decode workers where there is none), looked up once a second."""
        now = time.monotonic()
        if now - self._costed_at >= COST_S:
            self._costed_at = now
            known = [s for s in self.roster.sessions() if s.identity is not None]
            prefill = [s for s in known if s.identity is not None and s.identity.role is Role.PREFILL]
            costs = [(CostModel.from_mapping(s.stats.cost), s.stats.cost_batches) for s in prefill or known]
            self._usual = usual_cost(costs) or self._usual or (costs[0][0] if costs else None)
        return self._usual

    async def _set_health(self, status: Any) -> None:
        for name in ("", "lanewise.v1.Inference"):
            await self._health.set(name, status)
