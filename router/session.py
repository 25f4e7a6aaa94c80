"""One session with one worker process: from connecting to the reason it ended.

Owns: `Describe`, the hello/welcome check, pings, the one writer and the one reader of the stream, and what the worker
last said (statistics, cache index, work in flight). Must not: await a client, choose workers, or reconnect (the roster
does). A session that has ended is never used again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Protocol

import grpc
import structlog

from lanewise.fleet import WorkerIdentity, WorkerStats, WorkerView
from lanewise.request import Failure, Token
from lanewise.router.catalog import Catalog
from lanewise.router.discovery import Endpoint
from lanewise.router.prefix_index import BlockEventGap, PrefixIndex
from lanewise.router.readiness import why_not
from lanewise.rpc import convert
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from lanewise.rpc.tls import open_channel

PROTOCOL = 1
CONNECT_S = 5.0
TOKENIZER_S = 60.0

Key = tuple[str, int]

log = structlog.get_logger(__name__)


class Work(Protocol):
    """Who takes what a worker says of requests. Nothing here may block or await."""

    def tokens(self, source: str, tokens: list[Token]) -> None: ...
    def accepted(self, source: str, key: Key, cached_tokens: int) -> None: ...
    def committed(self, key: Key) -> None: ...
    def transfer_failed(self, source: str, key: Key, reason: str) -> None: ...
    def failed(self, source: str, failure: Failure) -> None: ...


class Owner(Protocol):
    """Who keeps the sessions."""

    def welcomed(self, session: Session) -> None: ...
    def changed(self, session: Session) -> None: ...


UNANSWERED_PINGS = 30  # a worker that talks and never answers has stopped listening


@dataclass(frozen=True, slots=True)
class Timing:
    ping_interval_s: float
    ping_misses: int


class SessionEnded(Exception):
    """Why a session is over, in words."""


class Session:
    def __init__(
        self, address: str, router: str, timing: Timing, catalog: Catalog, owner: Owner, work: Work, tls_dir: str = ""
    ) -> None:
        self.address = address
        self._tls_dir = tls_dir
        self.identity: WorkerIdentity | None = None  # set once welcomed
        self.description = pb.Description()
        self.wire_stats = pb.Stats()
        self.stats = WorkerStats()
        self.stats_at = 0.0
        self.not_ready = "not welcomed yet"  # why it gets no new work; empty when it does
        self.endpoint = Endpoint()
        self.handed_over_at = 0.0  # when its streams were last looked at to be moved
        self.prefixes = PrefixIndex()
        self.carried: dict[Key, int] = {}  # (request, epoch) -> uncached tokens, until released or cancelled
        self._fresh: dict[Key, int] = {}  # the part of `carried` that `stats` cannot know of yet
        self._accepted: set[Key] = set()
        self._view: WorkerView | None = None  # as of now; None: something has changed
        self._awaiting: set[Key] = set()  # decode attempts whose KV is not there yet: in no number of the worker's
        self._router = router
        self._timing = timing
        self._catalog = catalog
        self._owner = owner
        self._work = work
        self._outgoing: deque[pb.RouterMessage] = deque()
        self._wake = asyncio.Event()
        self._heard = False
        self._unanswered = 0

    # ------------------------------------------------------------ for the dispatcher

    def send(self, message: pb.RouterMessage) -> None:
        self._outgoing.append(message)
        self._wake.set()

    def carry(self, key: Key, uncached_tokens: int) -> None:
        """0 tokens: another worker computes them, and this one decodes."""
        self.carried[key] = uncached_tokens
        if uncached_tokens:
            self._fresh[key] = uncached_tokens
        else:
            self._awaiting.add(key)
        self._view = None

    def release(self, key: Key) -> None:
        self.carried.pop(key, None)
        self._fresh.pop(key, None)
        self._accepted.discard(key)
        self._awaiting.discard(key)
        self._view = None

    def place(self, endpoint: Endpoint) -> None:
        """What discovery says of its address now."""
        self.endpoint = endpoint
        self._judge()

    def view(self) -> WorkerView:
        if self._view is not None:
            return self._view
        assert self.identity is not None  # the roster holds welcomed sessions only
        waits = self.stats.queue_wait_s > 0  # it runs down by itself: what is left of the batch that ran then
        age = time.monotonic() - self.stats_at if waits else 0.0
        view = WorkerView(
            identity=self.identity,
            stats=replace(self.stats, queue_wait_s=max(0.0, self.stats.queue_wait_s - age)) if waits else self.stats,
            ready=not self.not_ready,
            inflight_requests=len(self._fresh) + len(self._awaiting),
            inflight_tokens=sum(self._fresh.values()),
        )
        if not waits:  # else it ages
            self._view = view
        return view

    # ------------------------------------------------------------ life

    async def run(self) -> str:
        """Connect and serve until the session is over. Returns why; only cancellation is raised."""
        async with open_channel(self.address, self._tls_dir) as channel:
            # grpcio's stub classes carry no types for their async form.
            stub: Any = pb_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
            try:
                description = await self._describe(stub)
                call = stub.Session()
                try:
                    await self._open(call, description)
                    return await self._serve(call)
                finally:
                    call.cancel()
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            except (SessionEnded, BlockEventGap) as error:
                return str(error)
            except TimeoutError:
                return "no answer in time"
            except Exception as error:  # a defect met with one worker must not end the sessions with the others
                log.exception("session_defect", address=self.address)
                return f"defect: {error!r}"

    async def _describe(self, stub: Any) -> pb.Description:
        reply: pb.DescribeReply = await stub.Describe(pb.DescribeRequest(), timeout=CONNECT_S)
        if not self._catalog.knows(reply.description):
            reply = await stub.Describe(pb.DescribeRequest(with_tokenizer=True), timeout=TOKENIZER_S)
            await self._catalog.learn(reply)
        return reply.description

    async def _open(self, call: Any, described: pb.Description) -> None:
        hello = pb.RouterHello(router=self._router, expected_incarnation=described.incarnation, protocol=PROTOCOL)
        async with asyncio.timeout(CONNECT_S):
            await call.write(pb.RouterMessage(hello=hello))
            first = await call.read()
        if first is grpc.aio.EOF or first.WhichOneof("message") != "welcome":
            raise SessionEnded("the worker did not answer with a welcome")
        description = first.welcome.description
        if description.incarnation != described.incarnation:
            raise SessionEnded(f"welcomed by {description.incarnation}, expected {described.incarnation}")
        try:
            self.identity = convert.description_from_wire(description)
        except ValueError as error:
            raise SessionEnded(str(error)) from error
        self.description = description
        self._judge()
        self._catalog.update(description)
        self._owner.welcomed(self)

    async def _serve(self, call: Any) -> str:
        tasks = [asyncio.create_task(part) for part in (self._read(call), self._write(call), self._ping())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return "; ".join(task.result() for task in done)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, call: Any) -> str:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outgoing:
                try:
                    await call.write(self._outgoing.popleft())
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                    return f"stream broken while writing: {_words(error)}"

    async def _read(self, call: Any) -> str:
        while True:
            try:
                message = await call.read()
            except grpc.aio.AioRpcError as error:
                return f"stream broken: {_words(error)}"
            if message is grpc.aio.EOF:
                return "closed by the worker"
            self._heard = True
            try:
                self._handle(message)
            except BlockEventGap as error:
                return f"gap in block events: {error}"

    async def _ping(self) -> str:
        """Anything the worker sends proves that it lives; that it still reads, only an answer does, which may queue.

        Counted in ticks of this task, so a router that was itself stopped for a while does not blame its workers.
        """
        number = misses = 0
        while True:
            number += 1
            self.send(pb.RouterMessage(ping=pb.Ping(number=number)))
            self._heard = False
            self._unanswered += 1
            await asyncio.sleep(self._timing.ping_interval_s)
            misses = 0 if self._heard else misses + 1
            if misses >= self._timing.ping_misses:
                return f"{misses} pings missed"
            if self._unanswered >= UNANSWERED_PINGS:
                return f"{self._unanswered} pings unanswered"

    def _handle(self, message: pb.WorkerMessage) -> None:
        assert self.identity is not None  # only after the welcome
        source = self.identity.incarnation
        match message.WhichOneof("message"):
            case "step":
                self._work.tokens(source, convert.tokens_from_wire(message.step))
            case "stats":
                self._take_stats(message.stats)
            case "accepted":
                key = (message.accepted.request_id, message.accepted.epoch)
                self._accepted.add(key)
                self._work.accepted(source, key, message.accepted.cached_tokens)
            case "committed":
                key = (message.committed.request_id, message.committed.epoch)
                if key in self._awaiting:
                    self._awaiting.discard(key)
                    self._fresh[key] = 0
                    self._accepted.add(key)
                self._work.committed(key)
            case "failed":
                self._work.failed(source, convert.failure_from_wire(message.failed))
            case "transfer_failed":
                failed = message.transfer_failed
                self._work.transfer_failed(source, (failed.request_id, failed.epoch), failed.reason)
            case "blocks":
                blocks = message.blocks
                self.prefixes.apply(blocks.number, blocks.snapshot, blocks.added, blocks.removed)
            case "pong":
                self._unanswered = 0
            case _:  # what only a newer worker says
                pass

    def _take_stats(self, wire: pb.Stats) -> None:
        self.wire_stats = wire
        self.stats = convert.stats_from_wire(wire)
        self.stats_at = time.monotonic()
        for key in self._accepted:  # the worker has counted these by itself now
            self._fresh.pop(key, None)
        self._accepted.clear()
        self._judge()
        self._owner.changed(self)

    def _judge(self) -> None:
        if self.identity is not None:
            self.not_ready = why_not(self.identity, self.stats, self.endpoint)
        self._view = None


def _words(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
