"""The gRPC side of a worker: sessions with routers, `Describe`, `Drain`, health.

Owns: the `lanewise.v1.Worker` service, one bounded send queue per session, and the rule that a lost session frees
everything it carried. Must not: know the engine or the KV channel; it talks to a `Backend` that only enqueues.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import grpc
import structlog

from lanewise.errors import LanewiseError
from lanewise.fleet import Lane, WorkerIdentity, WorkerStats
from lanewise.request import Submission, Token
from lanewise.rpc import convert
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from lanewise.rpc.outbox import Batch
from lanewise.rpc.session_queue import MAX_QUEUED, Peer, SessionQueue

PROTOCOL = 1
WRITE_DEADLINE_S = 5.0  # a router that does not read for this long loses its session
STATS_DELAY_S = 0.005  # statistics follow tokens, and those of quick steps leave together
STATS_INTERVAL_S = 0.1
STATS_REPEAT_S = 1.0  # unchanged statistics are repeated this often, so that their age stays known

log = structlog.get_logger(__name__)


class Backend(Protocol):
    """The worker's loop as the asyncio thread sees it. Every method enqueues and returns at once."""

    def submit(self, session: str, submission: Submission) -> None: ...
    def cancel(self, key: tuple[str, int], reason: str) -> None: ...
    def session_lost(self, session: str) -> None: ...
    def set_lane(self, lane: Lane, expected_generation: int) -> None: ...
    def set_peers(self, peers: tuple[Peer, ...]) -> None: ...


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What `Describe` serves, so that routers need no model files."""

    tokenizer_json: bytes
    tokenizer_hash: str
    chat_template: str
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    generation_defaults_json: str


class WorkerService(pb_grpc.WorkerServicer):
    """One per worker process; all methods run on its asyncio loop."""

    def __init__(
        self, identity: WorkerIdentity, tokenizer: TokenizerFiles, *, memory_bytes: int, session_idle_s: float
    ) -> None:
        self._identity = identity
        self._tokenizer = tokenizer
        self._memory_bytes = memory_bytes
        self._session_idle_s = session_idle_s
        self._sessions: dict[str, SessionQueue] = {}
        self._cached: set[bytes] = set()  # mirror of the engine's prefix cache, for snapshots
        self._stats = WorkerStats(kv_capacity_tokens=identity.kv_capacity_tokens)
        self._stats_sent_at = 0.0
        self._stats_timer: asyncio.TimerHandle | None = None
        self._backend: Backend | None = None
        self._on_drain: Callable[[float], object] = _nothing
        self._draining = self._handover = False
        self._empty = asyncio.Event()  # no session is open
        self._empty.set()

    def attach(self, backend: Backend, on_drain: Callable[[float], object]) -> None:
        """`on_drain` starts a drain; it gets the timeout that a Drain call asked for, 0 for the configured one."""
        self._backend, self._on_drain = backend, on_drain

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("attach() the backend before serving")
        return self._backend

    @property
    def stats(self) -> WorkerStats:
        """The engine's last word, with what only this side knows."""
        return replace(
            self._stats,
            draining=self._draining or self._stats.draining,
            handover=self._handover,
            routers=len(self._sessions),
        )

    # ------------------------------------------------------------ draining

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def tell_draining(self) -> None:
        self._draining = True
        self._broadcast_stats()

    def tell_handover(self) -> None:
        self._handover = True
        self._broadcast_stats()

    async def close(self, timeout_s: float) -> None:
        """End every session, after what is in it; what has not left by then is lost."""
        for session in self._sessions.values():
            session.closing = True
            session.wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()

    # ------------------------------------------------------------ from the engine

    def deliver(self, batch: Batch) -> None:
        """Spread one engine step over the sessions. Sessions that have gone are skipped: their work is cancelled."""
        for session_id, item in batch.items:
            session = self._sessions.get(session_id)
            if session is None:
                continue
            if isinstance(item, Token):
                session.put_tokens([item])
            else:
                session.put(item)
        if batch.blocks_added or batch.blocks_removed:
            self._cached.difference_update(batch.blocks_removed)
            self._cached.update(batch.blocks_added)
            for session in self._sessions.values():
                session.put_blocks(False, batch.blocks_added, batch.blocks_removed)
        if batch.stats is not None and batch.stats != self._stats:
            self._stats = batch.stats
            if self._stats_timer is None:
                self._stats_timer = asyncio.get_running_loop().call_later(STATS_DELAY_S, self._broadcast_stats)

    def _broadcast_stats(self) -> None:
        self._stats_timer = None
        self._stats_sent_at = time.monotonic()
        stats = self.stats
        for session in self._sessions.values():
            session.stats = stats
            session.wake.set()

    async def repeat_stats(self) -> None:
        """Owned task: repeats unchanged statistics, so that a router knows how old its view is."""
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            if time.monotonic() - self._stats_sent_at >= STATS_REPEAT_S:
                self._broadcast_stats()

    # ------------------------------------------------------------ Session

    async def Session(self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with asyncio.timeout(self._session_idle_s):
            first = await context.read()
        if not isinstance(first, pb.RouterMessage) or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session must be `hello`")
        hello = first.hello
        if hello.protocol != PROTOCOL:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"protocol {hello.protocol} is not {PROTOCOL}, which I speak"
            )
        if hello.expected_incarnation and hello.expected_incarnation != self._identity.incarnation:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"stale incarnation: expected {hello.expected_incarnation}, this is {self._identity.incarnation}",
            )
        session = SessionQueue(id=str(uuid.uuid4()), router=hello.router)
        session.put(pb.WorkerMessage(welcome=pb.Welcome(description=self._description())))
        session.put_blocks(True, sorted(self._cached), [])
        self._sessions[session.id] = session
        self._empty.clear()
        self._broadcast_stats()
        log.info("session_open", router=hello.router, session=session.id)
        reason = "router closed it"
        reader = asyncio.create_task(self._read(session, context))
        writer = asyncio.create_task(self._write(session, context))
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            reason = "; ".join(task.result() for task in done)
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            del self._sessions[session.id]
            if not self._sessions:
                self._empty.set()
            self.backend.session_lost(session.id)
            if session.peers and self._sessions:
                self._tell_peers()
            log.info("session_closed", router=hello.router, session=session.id, reason=reason)

    async def _read(self, session: SessionQueue, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        while True:
            try:
                async with asyncio.timeout(self._session_idle_s):
                    message = await context.read()
            except TimeoutError:
                return f"no ping for {self._session_idle_s:g} s"
            except grpc.aio.UsageError as error:
                return f"stream broken: {error}"
            if not isinstance(message, pb.RouterMessage):
                return "router closed it"
            self._handle(session, message)

    def _handle(self, session: SessionQueue, message: pb.RouterMessage) -> None:
        match message.WhichOneof("message"):
            case "submit":
                self._submit(session, message.submit)
            case "cancel":
                self.backend.cancel((message.cancel.request_id, message.cancel.epoch), message.cancel.reason)
            case "ping":
                session.put(pb.WorkerMessage(pong=pb.Pong(number=message.ping.number)))
            case "set_lane":
                self._set_lane(message.set_lane)
            case "peers":
                session.peers = tuple((p.kv_address, p.incarnation, p.fingerprint) for p in message.peers.peers)
                self._tell_peers()
            case other:
                log.warning("unknown_router_message", kind=other)

    def _tell_peers(self) -> None:
        """All partners that any router knows of: one that has not met a worker yet must not take it from the others."""
        self.backend.set_peers(tuple({p[1]: p for s in self._sessions.values() for p in s.peers}.values()))

    def _submit(self, session: SessionQueue, wire: pb.Submit) -> None:
        try:
            submission = convert.submit_from_wire(wire)
        except LanewiseError as error:
            failed = pb.Failed(
                request_id=wire.request_id, epoch=wire.epoch, code=error.code.value, message=error.message
            )
            session.put(pb.WorkerMessage(failed=failed))
            return
        self.backend.submit(session.id, submission)

    def _set_lane(self, wire: pb.SetLane) -> None:
        try:
            lane = Lane(wire.lane)
        except ValueError:
            log.warning("unknown_lane", lane=wire.lane)
            return
        self.backend.set_lane(lane, wire.expected_generation)

    async def _write(self, session: SessionQueue, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        while True:
            await session.wake.wait()
            session.wake.clear()
            while (message := session.take()) is not None:
                if session.overflow:
                    return f"more than {MAX_QUEUED} messages unread"
                try:
                    # Not wait_for: in Python 3.11 it loses a cancellation that comes as the write completes, and a
                    # writer that outlives its reader would keep a dead session looking alive.
                    async with asyncio.timeout(WRITE_DEADLINE_S):
                        await context.write(message)
                except TimeoutError:
                    return f"router did not read for {WRITE_DEADLINE_S:g} s"
                except grpc.aio.UsageError as error:
                    return f"stream broken: {error}"
            if session.closing:
                return "this worker stops"

    # ------------------------------------------------------------ Describe, Drain

    def _description(self) -> pb.Description:
        return convert.description_to_wire(
            self._identity, memory_bytes=self._memory_bytes, tokenizer_hash=self._tokenizer.tokenizer_hash
        )

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:
        reply = pb.DescribeReply(description=self._description())
        if request.with_tokenizer:
            reply.tokenizer_json = self._tokenizer.tokenizer_json
            reply.chat_template = self._tokenizer.chat_template
            reply.special_tokens.update(self._tokenizer.special_tokens)
            reply.eos_token_ids.extend(self._tokenizer.eos_token_ids)
            reply.generation_defaults_json = self._tokenizer.generation_defaults_json
        return reply

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:
        self._on_drain(request.timeout_s)
        stats = self._stats
        return pb.DrainReply(remaining=stats.queued_requests + stats.running_requests)


def _nothing(_: float) -> None:
    pass
