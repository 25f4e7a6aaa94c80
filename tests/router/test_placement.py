"""What the router tells the routing policy: who is ready, what is counted once, and what each link costs."""

from __future__ import annotations

import asyncio

import pytest

from lanewise.policy.routing import RouteRequest, choose_pair
from lanewise.router import placement
from lanewise.rpc import lanewise_pb2 as pb
from tests.router.scripted import partly, rig, until


async def test_a_running_request_is_counted_once() -> None:
    async with rig() as made:
        made.prefill.on_submit = made.prefill.silent
        made.decode.on_submit = made.decode.silent
        answer = asyncio.create_task(made.text())
        session = made.router.roster.session(made.decode.incarnation)
        assert session is not None
        await until(lambda: made.decode.submits)
        made.decode.accept(made.decode.submits[0])
        made.decode.say(stats=made.decode.stats())
        await until(lambda: session.stats_at > 0 and session.view().inflight_requests == 1)
        made.decode.commit(made.decode.submits[0])  # from here on its own statistics count it
        made.decode.say(stats=made.decode.stats(running_requests=1))
        await until(lambda: session.stats.running_requests == 1)
        assert session.view().inflight_requests == 0
        assert len(session.carried) == 1
        answer.cancel()
        await until(lambda: not session.carried)
        assert session.view().inflight_requests == 0


async def test_a_prefill_worker_that_has_measured_nothing_is_placed_by_what_its_siblings_measured() -> None:
    """By its own guess it would draw every request until it knew better."""
    async with rig("ppd") as made:
        known, fresh = (worker for worker in made.workers if worker.role == "prefill")
        sessions = [made.router.roster.session(worker.incarnation) for worker in (known, fresh)]
        assert sessions[0] is not None
        assert sessions[1] is not None
        known.say(stats=known.stats(cost={"compute_s": 0.25}, cost_batches=50))
        await until(lambda: sessions[0].stats.cost_batches == 50)
        for _ in range(2):
            fresh.say(stats=fresh.stats(cost={"compute_s": 1e-6}))
            await until(lambda: sessions[1].view().stats.cost.get("compute_s") == 0.25)
        fresh.say(stats=fresh.stats(cost={"compute_s": 0.125}, cost_batches=10))
        await until(lambda: sessions[1].view().stats.cost.get("compute_s") == 0.125)


async def test_a_prefill_worker_needs_one_verified_partner() -> None:
    async with rig() as made:
        failed = pb.LinkInfo(peer=made.decode.incarnation, state="failed", reason="no answer to 3 HELLOs")
        made.prefill.say(stats=pb.Stats(kv_capacity_tokens=100_000, links=[failed]))
        session = made.router.roster.session(made.prefill.incarnation)
        assert session is not None
        await until(lambda: session.not_ready == "no verified partner: no answer to 3 HELLOs")
        await made.text()
        assert [submit.mode for submit in made.decode.submits] == ["local"]
        made.prefill.say(stats=made.prefill.stats())
        await until(lambda: not session.not_ready)
        await made.text()
        assert made.decode.submits[-1].mode == "decode"


async def test_the_policy_learns_of_other_routers_and_of_the_size_of_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RouteRequest] = []

    def choose(request: RouteRequest, *args: object) -> object:
        asked.append(request)
        return choose_pair(request, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(placement, "choose_pair", choose)
    async with rig() as made:
        made.decode.kv_bytes_per_token = 5120
        await made.decode.restart()
        await made.connected()
        await made.text()
        assert (asked[-1].kv_bytes_per_token, asked[-1].sampled) == (5120, False)
        made.decode.say(stats=made.decode.stats(routers=2))
        session = made.router.roster.session(made.decode.incarnation)
        assert session is not None
        await until(lambda: session.stats.routers == 2)
        await made.text()
        assert asked[-1].sampled


async def test_the_two_ways_of_prefill_are_measured_side_by_side() -> None:
    async with rig() as made:
        for _ in range(3):
            await made.text()
        ledger = made.router.dispatcher.ledger
        assert (ledger.remote.requests, ledger.local.requests) == (3, 0)
        measured, predicted, other = ledger.remote.means
        assert measured > 0
        assert predicted > 0
        assert other > 0
        assert ledger.kv_transfers == 3
        made.decode.on_submit = partly(made.decode, 4, lambda submit: made.decode.fail(submit, "DRAINING"))
        await made.text()  # disturbed after its first token: that one still counts
        assert ledger.remote.requests == 4
        assert ledger.resumed == 1
        page = made.router.metrics.render().decode()
        assert 'lanewise_prefill_ttft_seconds{kind="measured",way="remote"}' in page
        assert "lanewise_kv_transfers_total 5.0" in page
