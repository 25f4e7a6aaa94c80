"""A whole router against scripted workers: the life of a request, and everything that can interrupt it."""

from __future__ import annotations

import asyncio
import contextlib
import json

import grpc
import pytest

from lanewise.request import choice_seed
from lanewise.router import http_server, orders
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.router.scripted import CONTEXT, ScriptedWorker, partly, rig, story, until


class TestHappy:
    async def test_tokens_of_both_workers_make_one_text(self) -> None:
        async with rig() as made:
            assert await made.text(24) == story(24)
            prefill, decode = made.prefill.submits[0], made.decode.submits[0]
            assert (prefill.mode, decode.mode) == ("prefill", "decode")
            assert prefill.partner_incarnation == made.decode.incarnation
            assert (prefill.request_id, prefill.epoch) == (decode.request_id, 1)
            assert prefill.sampling.seed == decode.sampling.seed != 0
            assert made.prefill.cancels == made.decode.cancels == []

    async def test_only_decode_workers(self) -> None:
        async with rig("d") as made:
            assert await made.text() == story(12)
            assert [submit.mode for submit in made.decode.submits] == ["local"]

    async def test_finished_at_token_1(self) -> None:
        async with rig() as made:
            made.decode.on_submit = made.decode.silent
            assert await made.text(1) == story(1)
            await until(lambda: made.decode.cancels)

    async def test_choices_have_seeds_of_their_own(self) -> None:
        async with rig() as made:
            _, reply, _ = await made.post(n=3, seed=7, max_tokens=4)
            assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
            assert reply["usage"]["completion_tokens"] == 12
            assert reply["usage"]["prompt_tokens"] == 2
            seeds = [submit.sampling.seed for submit in made.decode.submits]
            assert seeds == [choice_seed(7, i) for i in range(3)]
            assert len({submit.request_id for submit in made.decode.submits}) == 3

    async def test_stop_string_cancels_and_drops_overshoot(self) -> None:
        async with rig() as made:
            made.decode.on_submit = partly(made.decode, 60, lambda _: None)
            _, reply, _ = await made.post(max_tokens=100, stop=[" went", "zzz"])
            choice = reply["choices"][0]
            assert choice["text"] == story(100).partition(" went")[0]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " went")
            await until(lambda: made.decode.cancels)

    async def test_peers_reach_prefill_workers(self) -> None:
        async with rig("pdd") as made:
            decodes = {worker.incarnation for worker in made.workers if worker.role == "decode"}
            await until(lambda: made.prefill.peers and {p.incarnation for p in made.prefill.peers[-1].peers} == decodes)
            assert {p.fingerprint for p in made.prefill.peers[-1].peers} == {"ff"}

    async def test_prefix_hits_lower_the_work_and_are_told(self) -> None:
        from lanewise.policy.blocks import cache_key, chain_hashes

        async with rig() as made:
            ids = [5] * 200
            units = chain_hashes(ids, cache_key("ff", b""))
            made.prefill.say(blocks=pb.BlockEvents(number=1, added=b"".join(units[:2])))
            session = made.router.roster.session(made.prefill.incarnation)
            assert session is not None
            await until(lambda: len(session.prefixes) == 2)
            assert made.router.roster.cached_tokens(ids, b"")[made.prefill.incarnation] == 128

            async def cached(submit: pb.Submit) -> None:
                made.prefill.accept(submit, cached=128)
                made.prefill.tokens(submit, 0, 1)

            made.prefill.on_submit = cached
            _, reply, _ = await made.post(prompt=ids, max_tokens=3)
            assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 128}


class TestOrder:
    async def test_stale_duplicate_and_early_tokens(self) -> None:
        async with rig() as made:

            async def messy(submit: pb.Submit) -> None:
                made.decode.commit(submit)
                for index in (3, 2, 1, 1, 2, 4, 3):
                    made.decode.token(submit, index)
                stale = pb.Submit(request_id=submit.request_id, epoch=submit.epoch + 7)
                made.decode.token(stale, 5, token_id=7)
                made.decode.token(pb.Submit(request_id="nobody", epoch=1), 0)
                made.decode.tokens(submit, 5, 8)

            made.decode.on_submit = messy
            assert await made.text(8) == story(8)


class TestHolding:
    async def test_held_until_a_worker_comes(self) -> None:
        async with rig("d") as made:
            await made.decode.stop()
            await until(lambda: not made.router.roster.sessions())
            answer = asyncio.create_task(made.text())
            await until(lambda: made.router.dispatcher.num_held == 1)
            await made.decode.restart()
            assert await answer == story(12)

    async def test_before_any_worker_was_ever_seen(self) -> None:
        worker = ScriptedWorker("decode")
        await worker.start()
        await worker.stop()
        async with rig("", workers=(worker.address,)) as made:
            answer = asyncio.create_task(made.text())
            await worker.restart()
            assert await answer == story(12)
        await worker.stop()

    async def test_no_workers_after_hold_timeout(self) -> None:
        async with rig("d", hold_timeout_s=0.1) as made:
            await made.decode.stop()
            await until(lambda: not made.router.roster.sessions())
            status, reply, headers = await made.post(stream=True)
            assert (status, reply["error"]["code"]) == (503, "NO_WORKERS")
            assert "x-should-retry" not in headers
            assert headers["retry-after"] == "1"

    async def test_nobody_can_have_requests_held_for_ever_or_not_at_all(self) -> None:
        """The question comes by a port that clients reach too."""
        async with rig("d", hold_timeout_s=5.0) as made:
            dispatcher = made.router.dispatcher
            for asked, held in ((3.0, 3.0), (float("nan"), 3.0), (1e9, 5.0), (float("inf"), 5.0), (-1.0, 1.0)):
                dispatcher.hold_for(asked)
                assert dispatcher.hold_timeout_s == held, asked

    async def test_whoever_scales_says_how_long_to_hold_and_learns_of_those_who_waited(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`scaleToZero.maxHold`, after and before the first worker was seen; absent, it stays as it was."""
        monkeypatch.setattr(orders, "SHORTEST_HOLD_S", 0.1)
        for roles in ("d", ""):
            async with rig(roles, served_name="fable", hold_timeout_s=60.0) as made:
                for worker in made.workers:
                    await worker.stop()
                await until(lambda made=made: not made.router.roster.sessions())  # type: ignore[misc]
                async with grpc.aio.insecure_channel(str(made.router.grpc)) as channel:
                    stub = pb_grpc.FleetStub(channel)  # type: ignore[no-untyped-call]
                    for number, question in enumerate((pb.FleetRequest(max_hold_s=0.1), pb.FleetRequest())):
                        assert (await stub.Snapshot(question)).held_total == number
                        status, reply, _ = await made.post()
                        assert (status, reply["error"]["code"]) == (503, "NO_WORKERS"), reply
                    assert (await stub.Snapshot(pb.FleetRequest())).held_total == 2

    async def test_holding_is_bounded(self) -> None:
        async with rig("d", hold_max_requests=2, hold_timeout_s=1.0) as made:
            await made.decode.stop()
            await until(lambda: not made.router.roster.sessions())
            answers = [asyncio.create_task(made.post()) for _ in range(3)]
            statuses = sorted([(await answer)[0] for answer in answers])
            assert statuses == [429, 503, 503]

    async def test_a_held_stream_is_kept_alive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_server, "FIRST_KEEP_ALIVE_S", 0.02)
        monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.02)
        async with rig("d", hold_timeout_s=0.3) as made:
            await made.decode.stop()
            await until(lambda: not made.router.roster.sessions())
            body = {"model": "fable", "prompt": "x", "stream": True}
            async with made.http.post(made.url + "/v1/completions", json=body) as response:
                lines = [line async for line in response.content]
            assert response.status == 200
            assert lines.count(b": keep-alive\n") > 2
            error = json.loads(lines[-2].removeprefix(b"data: "))["error"]
            assert error["code"] == "NO_WORKERS"

    async def test_deadline(self) -> None:
        async with rig("d", request_timeout_s=0.15) as made:
            made.decode.on_submit = made.decode.silent
            status, reply, headers = await made.post()
            assert (status, reply["error"]["code"]) == (504, "DEADLINE")
            assert headers["x-should-retry"] == "false"
            await until(lambda: made.decode.cancels)

    async def test_shed_when_the_queue_is_too_long(self) -> None:
        async with rig("d", max_queue_wait_s=1.0) as made:
            made.decode.say(stats=pb.Stats(queue_wait_s=50.0, kv_capacity_tokens=100_000))
            session = made.router.roster.session(made.decode.incarnation)
            assert session is not None
            await until(lambda: session.stats.queue_wait_s)
            made.decode.on_submit = made.decode.silent
            # With nothing under way one is let through, with all its choices: it shows the truth.
            first = asyncio.create_task(made.post(n=2))
            await until(lambda: len(made.decode.submits) == 2)
            status, reply, headers = await made.post()
            assert (status, reply["error"]["code"]) == (429, "OVERLOADED")
            assert int(headers["retry-after"]) > 1
            first.cancel()

    async def test_who_is_sent_away_is_demand_and_who_comes_back_counts_once(self) -> None:
        async with rig("d", max_queue_wait_s=1.0) as made:
            busy, idle = (pb.Stats(queue_wait_s=wait, kv_capacity_tokens=100_000) for wait in (50.0, 0.0))
            made.decode.say(stats=busy)
            session = made.router.roster.session(made.decode.incarnation)
            assert session is not None
            await until(lambda: session.stats.queue_wait_s)
            made.decode.on_submit = made.decode.silent
            first = asyncio.create_task(made.post())
            await until(lambda: made.decode.submits)
            for prompt in ("a fox", "a fox", "a crow"):
                assert (await made.post(prompt=prompt))[0] == 429
            async with grpc.aio.insecure_channel(str(made.router.grpc)) as channel:
                stub = pb_grpc.FleetStub(channel)  # type: ignore[no-untyped-call]
                seen = (await stub.Snapshot(pb.FleetRequest())).demand
                assert (seen.requests, seen.refused, seen.returned) == (3, 2, 0)
                assert (seen.attainable, seen.ttft_late, seen.finished) == (2, 2, 0)
                first.cancel()
                made.decode.say(stats=idle)
                await until(lambda: not session.stats.queue_wait_s)
                made.decode.on_submit = made.decode.behave
                await made.text(prompt="a fox")
                await until(lambda: made.router.metrics.demand.total().finished)
                seen = (await stub.Snapshot(pb.FleetRequest())).demand
            assert (seen.requests, seen.refused, seen.returned) == (3, 2, 1)
            assert (seen.attainable, seen.ttft_late, seen.finished) == (2, 2, 1)


class TestClients:
    async def test_client_gone_frees_both_sides(self) -> None:
        async with rig() as made:
            made.decode.on_submit = partly(made.decode, 5, lambda _: None)
            for stream in (True, False):
                before = len(made.decode.cancels)
                answer = asyncio.create_task(made.post(max_tokens=50, stream=stream))
                await until(lambda before=before: len(made.decode.submits) > before)
                answer.cancel()
                await until(lambda before=before: len(made.decode.cancels) > before)
                made.decode.on_submit = made.decode.silent
            assert made.router.dispatcher.num_running == 0
            assert b'lanewise_requests_total{outcome="CANCELLED"} 2.0' in made.router.metrics.render()

    async def test_client_that_takes_nothing_is_cut_off(self) -> None:
        async with rig("d", client_stall_s=0.2) as made:
            go_on = True

            async def endless(submit: pb.Submit) -> None:
                for index in range(CONTEXT - 10):
                    made.decode.token(submit, index)
                    if index % 50 == 0:
                        await asyncio.sleep(0)
                while go_on:
                    await asyncio.sleep(0.01)

            made.decode.on_submit = endless
            host, port = made.router.http.host, made.router.http.port
            _, writer = await asyncio.open_connection(host, port, limit=1024)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF: fills up at once
            body = json.dumps(
                {"model": "fable", "prompt": ["a"] * 16, "max_tokens": 2000, "stream": True, "logprobs": 20}
            )
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write((head + body).encode())
            await until(lambda: len(made.decode.submits) == 16)
            await until(lambda: len(made.decode.cancels) == 16)
            go_on = False
            assert made.router.dispatcher.num_running == 0
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def test_draining_refuses_new_and_finishes_old(self) -> None:
        async with rig("d") as made:
            go = asyncio.Event()

            async def slow(submit: pb.Submit) -> None:
                made.decode.tokens(submit, 0, 4)
                await go.wait()
                made.decode.tokens(submit, 4, 12)

            made.decode.on_submit = slow
            answer = asyncio.create_task(made.text())
            await until(lambda: made.router.metrics.ttft.total > 0)
            drained = asyncio.create_task(made.router.drain())
            await until(lambda: made.router.front.draining)
            status, reply, headers = await made.post()
            assert (status, reply["error"]["code"]) == (503, "DRAINING")
            assert "x-should-retry" not in headers
            async with made.http.get(made.url + "/readyz") as ready:
                assert ready.status == 503
            assert not drained.done()
            go.set()
            assert await answer == story(12)
            await drained
