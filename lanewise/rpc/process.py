"""A worker process around its loop: gRPC server, health, ready line, signals, drain.

Owns: start-up order after the model is loaded, and shutdown order. Must not: know the role's work.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lanewise.config import WorkerConfig
from lanewise.errors import ConfigError
from lanewise.fleet import Role, WorkerIdentity
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from lanewise.rpc.drain import Drain
from lanewise.rpc.engine_metrics import serve_metrics
from lanewise.rpc.outbox import Outbox
from lanewise.rpc.serve import Backend, TokenizerFiles, WorkerService
from lanewise.rpc.tls import server_credentials
from lanewise.rpc.tokenizer_files import read_tokenizer_files

SERVICE = "lanewise.v1.Worker"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
EXIT_USAGE = 2
GC_OBJECTS = 20_000
FLUSH_S = 1.0  # after the last request: for its last bytes to leave
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

log = structlog.get_logger(__name__)


class Running(Backend, Protocol):
    """A backend with a life of its own."""

    def start(self) -> None: ...
    def drain(self) -> None: ...
    def give_back(self) -> None: ...
    def stop(self, timeout_s: float) -> bool: ...
    @property
    def idle(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the process tells about itself; `identity.address` is filled in once the port is known."""

    identity: WorkerIdentity
    tokenizer: TokenizerFiles
    memory_bytes: int
    startup_s: Mapping[str, float] = field(default_factory=dict)  # by phase


class LayoutFacts(Protocol):
    @property
    def bytes_per_token(self) -> int: ...


class PoolFacts(Protocol):
    @property
    def layout(self) -> LayoutFacts: ...


class EngineFacts(Protocol):
    """What of a loaded engine the process tells about."""

    fingerprint: str
    fingerprint_fields: dict[str, str]
    eos_ids: frozenset[int]
    vocab_size: int
    max_context_tokens: int
    model_dir: Path
    device: str
    memory_bytes: int
    power_watts: int
    startup_s: dict[str, float]

    @property
    def pool(self) -> PoolFacts: ...


def worker_facts(
    config: WorkerConfig, role: Role, engine: EngineFacts, *, incarnation: str, kv_address: str, kv_capacity_tokens: int
) -> WorkerFacts:
    """Raises ConfigError when the model directory lacks its tokenizer."""
    identity = WorkerIdentity(
        role=role,
        name=config.name or f"{role.value}-{os.getpid()}",
        incarnation=incarnation,
        address="",
        kv_address=kv_address,
        model=config.served_name or config.model.rstrip("/").rpartition("/")[2],
        fingerprint=engine.fingerprint,
        fingerprint_fields=engine.fingerprint_fields,
        max_context_tokens=engine.max_context_tokens,
        kv_capacity_tokens=kv_capacity_tokens,
        vocab_size=engine.vocab_size,
        device=engine.device,
        pid=os.getpid(),
        kv_bytes_per_token=engine.pool.layout.bytes_per_token,
        power_watts=engine.power_watts,
    )
    tokenizer = read_tokenizer_files(engine.model_dir, engine.eos_ids)
    return WorkerFacts(identity, tokenizer, memory_in_use(engine), engine.startup_s)


def memory_in_use(engine: EngineFacts) -> int:
    """What this worker takes of its device: on a CPU the resident memory of the process."""
    if engine.device != "cpu":
        return engine.memory_bytes
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settle_collector() -> None:
    """What start-up made (torch alone: some hundred thousand objects) lives as long as the process: no collection looks
    at it again; and requests make few cycles, so they are looked for rarely."""
    gc.collect()
    gc.set_threshold(GC_OBJECTS, 20, 100)
    gc.freeze()


async def serve_worker(config: WorkerConfig, facts: WorkerFacts, build: Callable[[Outbox], Running]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain."""
    loop = asyncio.get_running_loop()
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        ]
    )
    identity = replace(facts.identity, address=_bind(server, config))
    service = WorkerService(
        identity, facts.tokenizer, memory_bytes=facts.memory_bytes, session_idle_s=config.session_idle_s
    )
    backend = build(Outbox(loop, service.deliver))
    checks = health.aio.HealthServicer()
    # The empty name stays: it says that the process lives, and a worker that drains must not be killed for it.
    drain = Drain(backend, service, lambda: checks.set(SERVICE, NOT_SERVING))
    service.attach(backend, lambda timeout_s: drain.begin(timeout_s or config.drain_timeout_s, config.drain_max_s))
    pb_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = (pb.DESCRIPTOR.services_by_name["Worker"].full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    metrics = serve_metrics(config.metrics, identity, service)
    probes = await _serve_probes(config, checks)
    backend.start()
    await server.start()
    for name in ("", SERVICE):
        await checks.set(name, SERVING)
    settle_collector()
    stop = _signals(loop, drain)
    _ready_line(identity, facts)
    repeater = asyncio.create_task(service.repeat_stats())
    try:
        await stop.wait()
        await drain.begin(config.drain_timeout_s, config.drain_max_s)
        await service.close(FLUSH_S)
    finally:
        repeater.cancel()
        metrics()
        await probes.stop(grace=None)
        await server.stop(grace=FLUSH_S)
        if not await asyncio.to_thread(backend.stop, 10.0):
            log.error("engine_thread_did_not_stop")
            os._exit(1)
    log.info("stopped")


async def _serve_probes(config: WorkerConfig, checks: health.aio.HealthServicer) -> grpc.aio.Server:
    """Health checks again, without TLS, where that is asked for: a kubelet has no certificate to show."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    if config.health_listen:
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        try:
            server.add_insecure_port(config.health_listen)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {config.health_listen}: {error}") from error
        await server.start()
    return server


def _bind(server: grpc.aio.Server, config: WorkerConfig) -> str:
    listen = config.listen
    host, _, _ = listen.rpartition(":")
    try:
        if config.encryption == "None":
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, server_credentials(config.secret_dir))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {listen}: {error}") from error
    return f"{host}:{port}"


def _signals(loop: asyncio.AbstractEventLoop, drain: Drain) -> asyncio.Event:
    """The event that the first signal sets; the second ends the drain."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            drain.hurry()
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    return stop


def _ready_line(identity: WorkerIdentity, facts: WorkerFacts) -> None:
    log.info(
        "ready",
        address=identity.address,
        kv_address=identity.kv_address,
        model=identity.model,
        device=identity.device,
        memory_bytes=facts.memory_bytes,
        kv_capacity_tokens=identity.kv_capacity_tokens,
        fingerprint=identity.fingerprint,
        incarnation=identity.incarnation,
        pid=identity.pid,
        startup_s=facts.startup_s,
    )


def die(error: ConfigError) -> None:
    """A start that cannot succeed: the reason on stderr, status 2, so that a supervisor does not try again."""
    print(f"lanewise: {error}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USAGE)
