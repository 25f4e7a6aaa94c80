"""Workers that are lost, refuse, or break their promises: what the client sees of it."""

from __future__ import annotations

import asyncio

import pytest

from lanewise.errors import ErrorCode
from lanewise.rpc import lanewise_pb2 as pb
from tests.router.scripted import partly, rig, sse, story, until


class TestFailover:
    @pytest.mark.parametrize("last", [1, 5, 11])
    async def test_decode_session_lost(self, last: int) -> None:
        async with rig("pdd") as made:
            for worker in made.workers[1:]:
                worker.on_submit = partly(worker, last, lambda _, w=worker: w.drop_session())
            assert await made.text() == story(12)
            submits = sorted((s for w in made.workers[1:] for s in w.submits), key=lambda submit: submit.epoch)
            assert [submit.epoch for submit in submits] in ([1, 2], [1, 2, 3])
            assert all(submit.resumed_output_ids for submit in submits[1:])

    async def test_restarted_at_the_same_address(self) -> None:
        async with rig() as made:
            lost = asyncio.Event()
            made.decode.on_submit = partly(made.decode, 6, lambda _: lost.set())
            answer = asyncio.create_task(made.text())
            await lost.wait()
            await made.decode.restart()
            assert await answer == story(12)
            assert made.decode.hellos[-1].expected_incarnation == made.decode.incarnation
            assert len(made.decode.submits[-1].resumed_output_ids) == 6

    async def test_prefill_lost_before_token_1_is_computed_by_the_decode_worker(self) -> None:
        async with rig() as made:
            made.prefill.on_submit = made.prefill.silent
            answer = asyncio.create_task(made.text())
            await until(lambda: made.prefill.submits and made.decode.submits)
            await made.prefill.stop()
            assert await answer == story(12)
            assert made.decode.submits[-1].mode == "local"

    async def test_prefill_lost_after_commit_changes_nothing(self) -> None:
        async with rig() as made:
            go = asyncio.Event()

            async def slow(submit: pb.Submit) -> None:
                made.decode.commit(submit)
                await go.wait()
                made.decode.tokens(submit, 1, 12)

            made.decode.on_submit = slow
            answer = asyncio.create_task(made.text())
            await until(lambda: made.router.metrics.ttft.total > 0)  # token 1 is out
            await made.prefill.stop()
            await until(lambda: len(made.router.roster.sessions()) == 1)
            go.set()
            assert await answer == story(12)
            assert len(made.decode.submits) == 1

    async def test_silent_worker_is_lost_after_missed_pings(self) -> None:
        async with rig("pdd", ping_interval_s=0.05) as made:
            worker = made.workers[1]
            worker.on_submit = partly(worker, 5, lambda _: setattr(worker, "mute", True))
            texts = await asyncio.gather(*(made.text() for _ in range(4)))
            assert texts == [story(12)] * 4

    async def test_gap_in_block_events_reopens_the_session(self) -> None:
        async with rig() as made:
            made.decode.say(blocks=pb.BlockEvents(number=2, added=b"x" * 16))
            await until(lambda: len(made.decode.hellos) == 2)
            await made.connected()
            assert await made.text() == story(12)

    async def test_budget_spent_is_an_error_event(self) -> None:
        async with rig() as made:

            async def crash(submit: pb.Submit) -> None:
                made.decode.commit(submit)
                made.decode.tokens(submit, len(submit.resumed_output_ids) + 1, len(submit.resumed_output_ids) + 2)
                await until(lambda: made.decode.stream is not None and made.decode.stream.outgoing.empty())
                made.decode.drop_session()

            made.decode.on_submit = crash
            events = await sse(made, max_tokens=100)
            assert events[-1]["error"]["code"] == ErrorCode.WORKER_LOST
            text = "".join(event["choices"][0]["text"] for event in events[:-1])
            assert story(100).startswith(text)
            assert text
            assert len(made.decode.submits) == 3

    async def test_committed_without_a_token(self) -> None:
        async with rig("pdd", commit_to_token_s=0.2) as made:

            async def stuck(submit: pb.Submit) -> None:
                made.workers[1].commit(submit)

            made.workers[1].on_submit = stuck
            texts = await asyncio.gather(*(made.text() for _ in range(3)))
            assert texts == [story(12)] * 3
            assert made.workers[1].submits
            await until(lambda: len(made.workers[1].cancels) == len(made.workers[1].submits))


class TestFreeRetries:
    async def test_busy_until_it_is_not(self) -> None:
        async with rig() as made:
            refusals = 5

            async def busy(submit: pb.Submit) -> None:
                if len(made.decode.submits) <= refusals:
                    made.decode.fail(submit, "OVERLOADED", "BUSY")
                else:
                    await made.decode.behave(submit)

            made.decode.on_submit = busy
            assert await made.text() == story(12)
            assert [submit.epoch for submit in made.decode.submits] == list(range(1, refusals + 2))

    async def test_transfer_failed_falls_back_to_local_prefill(self) -> None:
        async with rig() as made:

            async def broken(submit: pb.Submit) -> None:
                if submit.mode == "local":
                    await made.decode.behave(submit)
                else:
                    key = {"request_id": submit.request_id, "epoch": submit.epoch}
                    made.decode.say(transfer_failed=pb.TransferFailed(**key, reason="crc"))

            made.decode.on_submit = broken
            assert await made.text() == story(12)
            assert [submit.mode for submit in made.decode.submits] == ["decode", "local"]

    async def test_final_failure_is_the_answer(self) -> None:
        async with rig() as made:

            async def refuse(submit: pb.Submit) -> None:
                made.decode.fail(submit, "PROMPT_TOO_LONG", "can never fit", retryable=False)

            made.prefill.on_submit = made.prefill.silent
            made.decode.on_submit = refuse
            status, reply, headers = await made.post()
            assert (status, reply["error"]["code"]) == (400, "PROMPT_TOO_LONG")
            assert headers["x-should-retry"] == "false"
            await until(lambda: made.prefill.cancels)

    async def test_draining_worker_gets_nothing_new(self) -> None:
        async with rig("pdd") as made:
            made.workers[1].say(stats=pb.Stats(draining=True, kv_capacity_tokens=100_000))
            session = made.router.roster.session(made.workers[1].incarnation)
            assert session is not None
            await until(lambda: session.stats.draining)
            for _ in range(3):
                assert await made.text() == story(12)
            assert made.workers[1].submits == []
