"""The worker's end of a session over a real gRPC connection: order, slow routers, lost sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from lanewise.errors import ErrorCode
from lanewise.fleet import Lane, Role, WorkerIdentity, WorkerStats
from lanewise.request import Failure, FinishReason, Submission, Token
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from lanewise.rpc.outbox import Outbox
from lanewise.rpc.serve import PROTOCOL, TokenizerFiles, WorkerService

IDENTITY = WorkerIdentity(Role.DECODE, "d0", "inc-1", "", "", "m", "ff", {}, 100, 100, 100, "cpu", 1)


class Recorder:
    """A backend that only remembers what it was told."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, Submission]] = []
        self.cancelled: list[tuple[str, int]] = []
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        self.drains: list[float] = []
        self.peers: list[set[str]] = []

    def submit(self, session: str, submission: Submission) -> None:
        self.submitted.append((session, submission))

    def cancel(self, key: tuple[str, int], reason: str) -> None:
        self.cancelled.append(key)

    def session_lost(self, session: str) -> None:
        self.lost.put_nowait(session)

    def set_lane(self, lane: Lane, expected_generation: int) -> None: ...

    def set_peers(self, peers: tuple[tuple[str, str, str], ...]) -> None:
        self.peers.append({incarnation for _, incarnation, _ in peers})


class Worker:
    def __init__(self, service: WorkerService, backend: Recorder, outbox: Outbox, stub: pb_grpc.WorkerStub) -> None:
        self.service, self.backend, self.outbox, self.stub = service, backend, outbox, stub

    async def open(self, **hello: object) -> grpc.aio.StreamStreamCall:
        call = self.stub.Session()
        await call.write(pb.RouterMessage(hello=pb.RouterHello(router="r", protocol=PROTOCOL, **hello)))
        return call


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    service = WorkerService(
        IDENTITY, TokenizerFiles(b"{}", "h", "", {}, (0,), "{}"), memory_bytes=1, session_idle_s=0.5
    )
    backend = Recorder()
    service.attach(backend, backend.drains.append)
    server = grpc.aio.server()
    pb_grpc.add_WorkerServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        outbox = Outbox(asyncio.get_running_loop(), service.deliver)
        yield Worker(service, backend, outbox, pb_grpc.WorkerStub(channel))
    await server.stop(None)


async def read(call: grpc.aio.StreamStreamCall) -> pb.WorkerMessage:
    message = await asyncio.wait_for(call.read(), 5)
    assert isinstance(message, pb.WorkerMessage)
    return message


async def until(call: grpc.aio.StreamStreamCall, kind: str) -> pb.WorkerMessage:
    while (message := await read(call)).WhichOneof("message") != kind:
        pass
    return message


async def submit(worker: Worker, call: grpc.aio.StreamStreamCall) -> str:
    await call.write(pb.RouterMessage(submit=pb.Submit(request_id="r", epoch=1, mode="local", prompt_ids=[1])))
    async with asyncio.timeout(5):
        while not worker.backend.submitted:
            await asyncio.sleep(0.005)
    return worker.backend.submitted[-1][0]


async def test_a_session_opens_with_welcome_then_a_full_block_snapshot(worker: Worker) -> None:
    worker.outbox.blocks([b"a" * 16, b"b" * 16], [])
    worker.outbox.flush()
    await asyncio.sleep(0)
    call = await worker.open()
    assert (await read(call)).welcome.description.incarnation == "inc-1"
    snapshot = (await until(call, "blocks")).blocks
    assert snapshot.snapshot
    assert snapshot.number == 0
    assert snapshot.added == b"a" * 16 + b"b" * 16
    worker.outbox.blocks([b"c" * 16], [b"a" * 16])
    worker.outbox.flush()
    delta = (await until(call, "blocks")).blocks
    assert (delta.number, delta.snapshot, delta.added, delta.removed) == (1, False, b"c" * 16, b"a" * 16)


async def test_tokens_and_endings_of_a_request_keep_their_order(worker: Worker) -> None:
    call = await worker.open()
    session = await submit(worker, call)
    for index in range(3):
        worker.outbox.token(session, Token("r", 1, index, 7 + index))
        worker.outbox.flush()
    worker.outbox.failed(session, Failure("r", 1, ErrorCode.INTERNAL, "boom", False))
    worker.outbox.token(session, Token("other", 1, 0, 5, finish=FinishReason.STOP))
    worker.outbox.flush()
    seen: list[object] = []
    while len(seen) < 5:
        message = await read(call)
        if message.WhichOneof("message") == "step":
            seen += [(t.request_id, t.index) for t in message.step.tokens]
        elif message.WhichOneof("message") == "failed":
            seen.append(message.failed.code)
    assert seen == [("r", 0), ("r", 1), ("r", 2), "INTERNAL", ("other", 0)]


async def test_a_silent_router_loses_its_session_and_what_it_carried(worker: Worker) -> None:
    call = await worker.open()
    session = await submit(worker, call)
    assert await asyncio.wait_for(worker.backend.lost.get(), 5) == session


async def test_pings_keep_a_session_and_are_answered(worker: Worker) -> None:
    call = await worker.open()
    for number in range(4):  # longer in all than the idle limit
        await call.write(pb.RouterMessage(ping=pb.Ping(number=number)))
        assert (await until(call, "pong")).pong.number == number
        await asyncio.sleep(0.2)
    assert worker.backend.lost.empty()
    call.cancel()
    await asyncio.wait_for(worker.backend.lost.get(), 5)


async def test_a_router_that_expects_another_incarnation_is_told_so(worker: Worker) -> None:
    call = await worker.open(expected_incarnation="inc-0")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(call.read(), 5)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "inc-0" in (raised.value.details() or "")


async def test_a_senseless_submission_fails_alone(worker: Worker) -> None:
    call = await worker.open()
    await call.write(pb.RouterMessage(submit=pb.Submit(request_id="bad", epoch=1, mode="local")))
    failed = (await until(call, "failed")).failed
    assert (failed.request_id, failed.code) == ("bad", "INVALID_REQUEST")
    await submit(worker, call)


async def test_statistics_are_coalesced_to_the_latest(worker: Worker) -> None:
    call = await worker.open()
    await until(call, "stats")
    for tokens in range(50):
        worker.outbox.stats(WorkerStats(queued_tokens=tokens))
        worker.outbox.flush()
    latest = await until(call, "stats")
    while latest.stats.queued_tokens != 49:
        latest = await until(call, "stats")
    assert worker.service.stats.queued_tokens == 49


async def test_partners_are_those_that_any_router_knows_of(worker: Worker) -> None:
    async def tell(call: grpc.aio.StreamStreamCall, *names: str) -> None:
        peers = pb.Peers(peers=[pb.Peer(kv_address="tcp://x:1", incarnation=n, fingerprint="ff") for n in names])
        await call.write(pb.RouterMessage(peers=peers))

    async def known(*names: str) -> None:
        async with asyncio.timeout(5):
            while not worker.backend.peers or worker.backend.peers[-1] != set(names):
                await asyncio.sleep(0.005)

    first, second = await worker.open(), await worker.open()
    await tell(first, "d0", "d1")
    await known("d0", "d1")
    await tell(second, "d0")  # it has not met d1 yet
    await known("d0", "d1")
    first.cancel()
    await known("d0")


async def test_a_drain_call_passes_its_timeout_on_and_a_drain_is_told_to_routers(worker: Worker) -> None:
    call = await worker.open()
    await worker.stub.Drain(pb.DrainRequest(timeout_s=7.0))
    assert worker.backend.drains == [7.0]
    worker.service.tell_draining()
    worker.service.tell_handover()
    stats = (await until(call, "stats")).stats
    while not stats.handover:
        stats = (await until(call, "stats")).stats
    assert (stats.draining, stats.routers) == (True, 1)


async def test_closing_sends_what_waits_and_ends_the_stream(worker: Worker) -> None:
    call = await worker.open()
    session = await submit(worker, call)
    worker.outbox.token(session, Token("r", 1, 0, 7, finish=FinishReason.STOP))
    worker.outbox.flush()
    closing = asyncio.create_task(worker.service.close(5))
    step = (await until(call, "step")).step
    assert step.tokens[0].finish == "stop"
    while (await asyncio.wait_for(call.read(), 5)) is not grpc.aio.EOF:
        pass
    await closing
    assert worker.service.num_sessions == 0
