"""Feasible sets, the window, admission, lanes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.fleet import Lane, Role, WorkerIdentity, WorkerStats, WorkerView
from lanewise.policy.admission import OutputLengths, admit, peak_tokens
from lanewise.policy.feasible import Due, keep_most, shortest_safe_first
from lanewise.policy.lanes import COOLDOWN_S, LaneController, propose_move, published_move
from lanewise.policy.profile import make_profile
from lanewise.policy.window import FEW_SURPRISES, ArrivalRate, Loop, Surprises, hold_until

COST = make_profile("qwen2.5-32b", "h200", 1).cost.to_mapping()

dues = st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 2)), max_size=8).map(
    lambda rows: [Due(i, seconds, deadline, 0.0) for i, (seconds, deadline) in enumerate(rows)]
)


def _on_time(jobs: list[Due]) -> bool:
    at = 0.0
    for job in sorted(jobs, key=lambda due: due.deadline_s):
        at += job.seconds
        if at > job.deadline_s:
            return False
    return True


@given(dues)
@settings(deadline=None)
def test_keep_most_is_the_most_there_can_be(jobs: list[Due]) -> None:
    kept, given_up = keep_most(jobs, 0.0)
    best = max(n for n in range(len(jobs) + 1) if any(_on_time(list(c)) for c in combinations(jobs, n)))
    assert len(kept) == best
    assert _on_time(kept)
    assert {due.key for due in kept + given_up} == {due.key for due in jobs}


@given(dues, st.floats(1, 5))
@settings(deadline=None)
def test_overtaking_keeps_everyone_on_time(jobs: list[Due], caution: float) -> None:
    kept, _ = keep_most(jobs, 0.0)
    order = shortest_safe_first(kept, 0.0, caution, 100.0)
    assert sorted(due.key for due in order) == sorted(due.key for due in kept)
    at = 0.0
    for due in order:
        at += due.seconds
        assert at <= due.deadline_s + 1e-9


@given(
    st.floats(0, 10), st.floats(0, 1), st.integers(1, 50), st.floats(0.001, 1), st.floats(0, 1000), st.floats(-1, 11)
)
def test_hold_ends_after_now_and_before_the_slack(
    now: float, waited: float, requests: int, batch: float, rate: float, slack: float
) -> None:
    until = hold_until(now, now - waited, requests, batch, rate, slack)
    assert until is None or now < until <= min(slack, now - waited + batch / 2)


def test_hold_pays_only_where_the_next_arrival_is_near() -> None:
    assert hold_until(1.0, 1.0, 1, 0.020, 200.0, 9.0) is not None
    assert hold_until(1.0, 1.0, 1, 0.020, 20.0, 9.0) is None
    assert hold_until(1.0, 1.0, 8, 0.020, 200.0, 9.0) is None


def test_arrival_rate_rises_and_falls() -> None:
    rate = ArrivalRate()
    for i in range(4000):
        rate.observe(i * 0.01)
    busy = rate.at(40.0)
    assert 80 < busy < 120
    assert rate.at(60.0) < busy / 5


def test_closed_loops_hold_no_surprises() -> None:
    seen = Surprises()
    for i in range(12):
        seen.arrival(i * 0.05 - 0.005, 0.048)
        seen.began(i * 0.05)
        seen.ended(i * 0.05 + 0.04)
    assert seen.share < FEW_SURPRISES, "the worker was idle when they came"
    for i in range(200):
        seen.began(10 + i * 0.05)
        seen.arrival(10 + i * 0.05 + 0.001, 0.048)
    assert seen.share < 0.01, "they came with the first of a batch"
    for i in range(200):
        seen.began(20 + i * 0.05)
        seen.ended(20 + i * 0.05 + 0.05)
        seen.arrival(20 + i * 0.05 + 0.03, 0.048)
    assert seen.share > 0.9, "told of when the batch that kept them waiting was over"


def _loop(counts: Iterable[int], seen: Loop, *, waiting: int = 1) -> bool:
    """Long batches that end with so many requests, of which `waiting` are not answered."""
    for count in counts:
        seen.ended(long=True)
        for _ in range(count - waiting):
            seen.answered()
        seen.next_begins(waiting)
        seen.next_begins(waiting)  # asked again: nothing new
    return seen.closed


def test_users_who_wait_for_their_answers_are_told_by_their_number() -> None:
    dice, seen = random.Random(1), Loop()
    assert not _loop([8] * 11, seen), "too few to tell"
    assert _loop([7, 8, 8], seen)
    assert not _loop([9], seen), "one more than all"
    assert _loop([9] * 12, seen), "who stayed"
    seen.ended(long=False)
    seen.answered()
    seen.next_begins(3)
    assert seen.closed, "after a short batch some are still on their way"
    assert not _loop([1] * 40, Loop(), waiting=0), "of one alone there is nothing to tell"
    assert not _loop([5] * 40, Loop(), waiting=5), "long prompts under way, nobody comes or goes"
    for rate in (0.1, 0.5, 1.0, 3.0, 20.0):
        seen = Loop()
        told = [_loop([1 + _poisson(dice, rate)], seen, waiting=0) for _ in range(2000)]
        assert sum(told) < 0.01 * len(told), rate
    seen, queue = Loop(), 50
    for _ in range(2000):  # a backlog
        queue = max(4, queue + _poisson(dice, 3.0) - 3)
        assert not _loop([queue], seen, waiting=max(queue - 3, 0))


def _poisson(dice: random.Random, mean: float) -> int:
    count, left = 0, dice.expovariate(1.0)
    while left < mean:
        count, left = count + 1, left + dice.expovariate(1.0)
    return count


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=6))
def test_peak_tokens_against_stepping(running: list[tuple[int, int]]) -> None:
    """Every sequence grows by one a step and leaves when nothing remains: the rule is the exact peak."""
    peak = 0
    for step in range(1, 102):
        peak = max(peak, sum(held + step for held, remaining in running if remaining >= step))
    stay = sum(held for held, remaining in running if remaining)
    assert peak_tokens([r for r in running if r[1]]) == max(peak, stay if peak else 0)


def test_remaining_output_is_conditional_on_what_was_generated() -> None:
    lengths = OutputLengths(quantile=0.5)
    assert lengths.remaining(0, 1000) == 256
    for tokens in (10, 10, 10, 500, 520):
        lengths.observe(tokens)
    assert lengths.remaining(0, 1000) <= 10
    assert lengths.remaining(100, 1000) >= 400
    assert lengths.remaining(100, 120) == 20
    assert lengths.remaining(600, 1000) == 60


def test_admission_sheds_early() -> None:
    assert admit(1.0, 600.0, 30.0) is None
    assert admit(31.0, 600.0, 30.0) == 1.0
    assert admit(20.0, 5.0, 30.0) == 15.0


def _worker(name: str, lane: Lane, queued: int, age: float = 100.0, requests: int = 0) -> WorkerView:
    identity = WorkerIdentity(Role.PREFILL, name, name, "", "", "m", "f", {}, 10**6, 10**6, 1, "d", 1)
    stats = WorkerStats(
        queued_tokens=queued, queued_requests=requests, cost=COST, lane=lane, lane_age_s=age, lane_generation=3
    )
    return WorkerView(identity, stats, True)


P90 = {Lane.SHORT: 200, Lane.LONG: 3000}
loads = st.lists(
    st.tuples(st.sampled_from([Lane.SHORT, Lane.LONG]), st.integers(0, 50000), st.floats(0, 30)), max_size=8
)


@given(loads)
@settings(deadline=None)
def test_lane_moves_respect_cooldown_and_minimum(rows: list[tuple[Lane, int, float]]) -> None:
    views = [_worker(f"w{i}", lane, queued, age) for i, (lane, queued, age) in enumerate(rows)]
    move = propose_move(views, P90, 0.4)
    if move is None:
        return
    moved = next(view for view in views if view.identity.incarnation == move.incarnation)
    assert moved.stats.lane is not move.to
    assert min(view.stats.lane_age_s for view in views) >= COOLDOWN_S
    assert sum(view.stats.lane is moved.stats.lane for view in views) >= 2
    assert move.generation == moved.stats.lane_generation


def test_lanes_follow_the_load_without_flapping() -> None:
    short = [_worker("a", Lane.SHORT, 0), _worker("b", Lane.SHORT, 50)]
    hot = [_worker("c", Lane.LONG, 30000), _worker("d", Lane.LONG, 40000)]
    move = propose_move([*short, *hot], P90, 0.4)
    assert move is not None
    assert (move.incarnation, move.to) == ("a", Lane.LONG)
    assert propose_move([*short, _worker("c", Lane.LONG, 1000)], P90, 0.4) is None
    assert propose_move([], P90, 0.4) is None


def test_published_pools_move_by_pending_requests() -> None:
    views = [
        _worker("a", Lane.SHORT, 0, requests=9),
        _worker("b", Lane.LONG, 0, requests=1),
        _worker("c", Lane.LONG, 0),
    ]
    move = published_move(views)
    assert move is not None
    assert (move.incarnation, move.to) == ("b", Lane.SHORT)
    assert published_move(views[:2]) is None


def test_learned_boundary_splits_the_work() -> None:
    controller = LaneController(0.4)
    assert controller.start(1) == [Lane.ANY]
    assert controller.start(4).count(Lane.SHORT) == 2
    for _ in range(400):
        controller.lane_of(100, 100)
        controller.lane_of(3000, 3000)
    controller.propose([])
    assert 100 <= controller.boundary < 3000
