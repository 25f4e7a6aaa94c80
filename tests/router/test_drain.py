"""Drain as a router sees it: its own, and that of the workers it uses."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.router.scripted import ScriptedWorker, partly, rig, story, until


def draining(worker: ScriptedWorker, *, handover: bool = False) -> None:
    worker.say(stats=worker.stats(draining=True, handover=handover))


class TestWorkers:
    async def test_a_draining_worker_keeps_its_streams_and_gets_no_new_ones(self) -> None:
        async with rig("pdd") as made:
            first = await self._one_stream(made)
            running = made.workers[1] if made.workers[1].submits else made.workers[2]
            other = made.workers[2] if running is made.workers[1] else made.workers[1]
            draining(running)
            session = made.router.roster.session(running.incarnation)
            assert session is not None
            await until(lambda: session.not_ready == "draining")
            assert await made.text() == story(12)
            assert len(running.submits) == 1
            assert len(other.submits) == 1
            running.tokens(running.submits[0], 20, 40)
            assert await first == story(40)

    async def test_a_handover_moves_the_stream_and_loses_nothing(self) -> None:
        async with rig("pdd") as made:
            first = await self._one_stream(made)
            running = made.workers[1] if made.workers[1].submits else made.workers[2]
            other = made.workers[2] if running is made.workers[1] else made.workers[1]
            draining(running, handover=True)
            assert await first == story(40)
            assert [cancel.epoch for cancel in running.cancels] == [1]
            assert other.submits[0].epoch == 2
            assert len(other.submits[0].resumed_output_ids) >= 20
            ledger = made.router.dispatcher.ledger
            assert (ledger.handovers, ledger.resumed, ledger.failed) == (1, 1, 0)

    async def test_another_fingerprint_does_not_take_over(self) -> None:
        async with rig("pdd") as made:
            first = await self._one_stream(made)
            running = made.workers[1] if made.workers[1].submits else made.workers[2]
            other = made.workers[2] if running is made.workers[1] else made.workers[1]
            other.fingerprint = "ee"
            await other.restart()
            await made.connected()
            draining(running, handover=True)
            session = made.router.roster.session(running.incarnation)
            assert session is not None
            await until(lambda: session.handed_over_at)  # it was looked at
            running.tokens(running.submits[0], 20, 40)
            assert await first == story(40)
            assert other.submits == running.cancels == []
            assert made.router.dispatcher.ledger.handovers == 0

    async def test_the_only_decode_worker_finishes_in_place_and_new_ones_wait(self) -> None:
        async with rig("pd", hold_timeout_s=5.0) as made:
            first = await self._one_stream(made)
            draining(made.decode, handover=True)
            session = made.router.roster.session(made.decode.incarnation)
            assert session is not None
            await until(lambda: session.stats.handover)
            waits = asyncio.create_task(made.text())
            await until(lambda: made.router.dispatcher.num_held == 1)
            made.decode.tokens(made.decode.submits[0], 20, 40)
            assert await first == story(40)
            await made.decode.restart()
            assert await waits == story(12)
            assert made.router.dispatcher.ledger.handovers == 0

    async def test_the_only_prefill_worker_drains_and_the_decode_worker_prefills(self) -> None:
        async with rig("pd") as made:
            draining(made.prefill)
            session = made.router.roster.session(made.prefill.incarnation)
            assert session is not None
            await until(lambda: session.not_ready)
            assert await made.text() == story(12)
            assert [submit.mode for submit in made.decode.submits] == ["local"]

    async def test_a_handover_before_the_kv_is_committed(self) -> None:
        async with rig("pdd") as made:
            for worker in made.workers[1:]:
                worker.on_submit = worker.silent
            answer = asyncio.create_task(made.text())
            await until(lambda: any(worker.submits for worker in made.workers[1:]))
            running = next(worker for worker in made.workers[1:] if worker.submits)
            other = next(worker for worker in made.workers[1:] if worker is not running)
            other.on_submit = other.behave
            draining(running, handover=True)
            assert await answer == story(12)
            assert other.submits[0].epoch == 2

    async def test_drain_is_reported_to_the_operator(self) -> None:
        async with rig("pd") as made:
            made.decode.say(stats=made.decode.stats(draining=True, drain_eta_s=12.5))
            session = made.router.roster.session(made.decode.incarnation)
            assert session is not None
            await until(lambda: session.stats.draining)
            async with grpc.aio.insecure_channel(made.grpc_address) as channel:
                reply = await pb_grpc.FleetStub(channel).Snapshot(pb.FleetRequest(), timeout=5)
            (decode,) = [worker for worker in reply.workers if worker.description.role == "decode"]
            assert (decode.ready, decode.reason) == (False, "draining")
            assert decode.stats.drain_eta_s == 12.5
            assert decode.address == made.decode.address

    @staticmethod
    async def _one_stream(made) -> asyncio.Task[str]:  # type: ignore[no-untyped-def]
        """A stream of 40 tokens that has 20 and then pauses."""
        for worker in made.workers:
            if worker.role == "decode":
                worker.on_submit = partly(worker, 20, lambda _: None)
        task = asyncio.create_task(made.text(40))
        await until(lambda: any(session.carried for session in made.router.roster.sessions()))
        await until(lambda: made.router.metrics.output_tokens.value >= 20)
        for worker in made.workers:
            if worker.role == "decode" and not worker.submits:
                worker.on_submit = worker.behave
        return task


class TestRouter:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_running_requests_end_in_place_on_connections_that_then_close(self, stream: bool) -> None:
        async with rig("d") as made:
            made.decode.on_submit = partly(made.decode, 20, lambda _: None)
            body = {"model": "fable", "prompt": "Once", "max_tokens": 40, "stream": stream}
            call = asyncio.create_task(made.http.post(made.url + "/v1/completions", json=body))
            await until(lambda: made.router.metrics.output_tokens.value >= 20)
            drained = asyncio.create_task(made.router.drain())
            await until(lambda: made.router.front.draining)
            async with made.http.get(made.url + "/readyz") as ready:
                assert ready.status == 503
                assert ready.headers["connection"] == "close"
            async with made.http.get(made.url + "/healthz") as alive:
                assert alive.status == 200
            made.decode.tokens(made.decode.submits[0], 20, 40)
            async with await call as response:
                assert response.status == 200
                assert await response.read() != b""
            await drained
            await until(lambda: not made.router._http.connections)

    async def test_grpc_streams_finish_and_the_next_call_goes_elsewhere(self) -> None:
        async with rig("d") as made, rig("d") as elsewhere:
            made.decode.on_submit = partly(made.decode, 20, lambda _: None)
            target = f"ipv4:{made.grpc_address},{elsewhere.grpc_address}"
            async with grpc.aio.insecure_channel(target) as channel:
                stub = pb_grpc.InferenceStub(channel)
                request = pb.GenerateRequest(text="Once", sampling=pb.SamplingOptions(max_tokens=40))
                call = stub.Generate(request, timeout=10)
                await until(lambda: made.router.metrics.output_tokens.value >= 20)
                drained = asyncio.create_task(made.router.drain())
                await until(lambda: made.router.front.draining)
                await asyncio.sleep(0.05)
                events = [event async for event in stub.Generate(request, timeout=10)]
                assert events[-1].finished.reason == "length"
                assert len(elsewhere.decode.submits) == 1
                made.decode.tokens(made.decode.submits[0], 20, 40)
                text = "".join([event.delta.text async for event in call])
                assert text == story(40)
                await drained
