"""The router proposes lanes; only what a worker says of itself counts as having happened."""

from __future__ import annotations

import time

from lanewise.fleet import Lane
from lanewise.router.lanes import LaneKeeper
from lanewise.rpc import lanewise_pb2 as pb
from tests.router.scripted import Rig, ScriptedWorker, rig, until


def keeper_of(made: Rig) -> LaneKeeper:
    keeper = made.router.dispatcher.placer.lanes
    assert keeper is not None
    return keeper


async def say_lane(made: Rig, worker: ScriptedWorker, lane: str, generation: int) -> None:
    """The worker has moved; returns when the router knows."""
    stats = worker.stats(lane_generation=generation)
    stats.lane = lane
    worker.say(stats=stats)
    session = made.router.roster.session(worker.incarnation)
    assert session is not None
    await until(lambda: session.stats.lane_generation == generation, "the router heard of the lane")


async def test_lanes_are_off_unless_asked_for() -> None:
    async with rig("ppd") as made:
        assert made.router.dispatcher.placer.lanes is None


async def test_two_instances_get_one_lane_each_and_requests_follow() -> None:
    async with rig("ppd", instance_lanes="learned") as made:
        keeper, workers = keeper_of(made), [worker for worker in made.workers if worker.role == "prefill"]
        now = time.monotonic()
        first = keeper.propose(now)[0]
        assert (first.to, first.generation) == (Lane.SHORT, 0)
        repeated = keeper.propose(now + 5)[0]
        assert repeated == first, "until the worker says so, nothing has happened"
        short = next(worker for worker in workers if worker.incarnation == first.incarnation)
        long = next(worker for worker in workers if worker is not short)
        await until(lambda: len(short.lanes) == 2, "both proposals arrive; the worker takes one of them")
        assert short.lanes == [pb.SetLane(lane="short", expected_generation=0)] * 2
        await say_lane(made, short, "short", 1)
        second = keeper.propose(now + 10)[0]
        assert (second.incarnation, second.to) == (long.incarnation, Lane.LONG)
        await say_lane(made, long, "long", 1)
        assert keeper.propose(now + 15) == [], "nobody is in need"
        for _ in range(4):
            await made.text(4)
        assert (len(short.submits), len(long.submits)) == (4, 0)


async def test_one_instance_has_no_lane() -> None:
    async with rig("pd", instance_lanes="learned") as made:
        assert keeper_of(made).propose(time.monotonic()) == []
        assert await made.text(4)
