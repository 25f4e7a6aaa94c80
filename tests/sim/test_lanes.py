"""Instances follow a change of mix: in time, in one direction, and then they stay."""

from __future__ import annotations

import random

import pytest

from lanewise.fleet import Lane
from lanewise.policy.profile import make_profile
from lanewise.sim.cluster import SimConfig, simulate
from lanewise.sim.prefill import PrefillInstance
from lanewise.sim.workload import Request, Workload

CHANGE_S, END_S = 60.0, 100.0
FOLLOWED_S = 30.0
FEW_LONG, MANY_LONG = (200, 12), (30, 24)  # short and long prompts per second, for eight instances


def changing(before: tuple[int, int], after: tuple[int, int], seed: int) -> Workload:
    draw, now, requests = random.Random(seed), 0.0, []
    while now < END_S:
        short, long = before if now < CHANGE_S else after
        now += draw.expovariate(short + long)
        tokens = draw.randint(16, 128) if draw.random() < short / (short + long) else draw.randint(1024, 3000)
        requests.append(Request(len(requests), now, tokens))
    return Workload("changing", tuple(requests))


@pytest.mark.parametrize(
    ("before", "after", "grows"), [(FEW_LONG, MANY_LONG, Lane.LONG), (MANY_LONG, FEW_LONG, Lane.SHORT)]
)
def test_instances_follow_a_change_of_mix_and_do_not_flap(
    before: tuple[int, int], after: tuple[int, int], grows: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[tuple[float, Lane]] = []
    keep = PrefillInstance.set_lane

    def recorded(self: PrefillInstance, lane: Lane) -> None:
        moves.append((self._loop.now, lane))
        keep(self, lane)

    monkeypatch.setattr(PrefillInstance, "set_lane", recorded)
    profile = make_profile("qwen2.5-32b", "h200", compute_efficiency=0.55)
    simulate(SimConfig((profile,) * 8, (profile,), lanes="fixed"), changing(before, after, 1))
    moves = [move for move in moves if move[0] > 0]  # the first ones are where they start
    settled = [when for when, _ in moves if CHANGE_S - 25 < when <= CHANGE_S]
    assert not settled, "no move while the mix is the same"
    followed = [(when, lane) for when, lane in moves if when > CHANGE_S]
    assert followed, "nobody followed"
    assert {lane for _, lane in followed} == {grows}, followed
    assert followed[-1][0] <= CHANGE_S + FOLLOWED_S, followed
