"""Scaling decisions by example: who grows, how fast, what rolls back, zero, schedules, and the words for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from lanewise.policy.scaling import decide
from lanewise.policy.scaling_types import Demand, State
from tests.policy.scaling_cases import PERIOD_S, RULES, demand, drive, observe


def test_the_right_role_grows() -> None:
    quiet = [demand(1.0, 500, 50)] * 60
    long_prompts = drive(RULES, [*quiet, *[demand(8.0, 4000, 10)] * 8])
    long_outputs = drive(RULES, [*quiet, *[demand(20.0, 100, 1500)] * 20])
    assert (long_prompts[-1].prefill, long_prompts[-1].decode) == (
        6,
        2,
    )  # at most 400 %: decode follows; and it still seems to grow
    assert (long_outputs[-1].prefill, long_outputs[-1].decode) == (2, 8)  # at least 25 %: prefill follows
    assert "requests/s" in long_prompts[-1].reason
    assert "to " in next(d.reason for d in long_prompts[60:] if d.prefill > 1)


def test_a_step_is_followed_within_a_minute_and_given_up_after_the_window() -> None:
    decisions = drive(RULES, [demand(3.0)] * 60 + [demand(15.0)] * 40 + [demand(3.0)] * 60)
    before, up, after = decisions[59], decisions[63], decisions[-1]
    assert up.prefill > before.prefill
    assert after.prefill == before.prefill
    peak = max(decision.prefill for decision in decisions)
    down = next(i for i, d in enumerate(decisions) if i > 100 and d.prefill < peak)
    assert (down - 100) * PERIOD_S >= RULES.down_stabilization_s - PERIOD_S


def test_what_was_refused_needs_workers_too() -> None:
    """A fleet that serves a third and sends the rest away needs what the whole load needs, not what it serves."""
    quiet, load, served = [demand(3.0, output=800)] * 60, demand(12.0, output=800), demand(4.0, output=800)
    late = 0.5 * load.attainable  # whoever waits for long in an overloaded fleet
    shed = replace(
        load,
        output_tokens=served.output_tokens,
        finished=served.finished,
        refused=load.requests - served.requests,
        ttft_late=late,
    )
    whole, seen, blind = (
        drive(RULES, [*quiet, *[bin] * 16])[-1]
        for bin in (replace(load, ttft_late=late), shed, replace(served, ttft_late=served.attainable))
    )
    assert (seen.prefill, seen.decode) == (whole.prefill, whole.decode)
    assert seen.prefill > blind.prefill
    assert seen.decode > blind.decode


def test_no_answer_changes_nothing() -> None:
    decision = decide(RULES, State(), observe(PERIOD_S, (3, 2), Demand()))
    assert (decision.prefill, decision.decode) == (3, 2)
    assert "no router answered" in decision.reason


def test_a_fresh_operator_shrinks_nothing_before_its_window() -> None:
    decisions = drive(RULES, [demand(0.5)] * 30, (6, 6))
    assert all((d.prefill, d.decode) == (6, 6) for d in decisions[:20])
    assert decisions[-1].prefill < 6


def test_pending_pods_roll_back_and_retry_with_back_off() -> None:
    rules = replace(RULES, blocked_after_s=60.0, backoff_s=120.0)
    state, counts, now = State(), (1, 1), 0.0
    history: list[tuple[float, int, str]] = []
    pending_since: float | None = None
    for _ in range(120):
        now += PERIOD_S
        seen = observe(now, counts, demand(25.0, 2000, 20))
        fits = min(counts[0], 2)  # the node has room for two prefill workers
        pending = counts[0] - fits
        pending_since = (pending_since if pending_since is not None else now) if pending else None
        age = now - pending_since if pending_since is not None else 0.0
        seen = replace(seen, prefill=replace(seen.prefill, ready=fits, pending=pending, pending_s=age))
        decision = decide(rules, state, seen)
        state, counts = decision.state, (decision.prefill, decision.decode)
        history.append((now, decision.prefill, decision.blocked))
    grown = next(now for now, count, _ in history if count > 2)
    blocked = next(now for now, count, words in history if words)
    assert blocked - grown <= 60.0 + 2 * PERIOD_S
    assert all(count == 2 for now, count, words in history if words)
    tries = [now for (_, a, _), (now, b, _) in pairwise(history) if a == 2 and b > 2]
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert len(gaps) >= 2
    assert gaps == sorted(gaps)
    assert gaps[-1] > gaps[0]


def test_zero_and_back_both_roles_at_once() -> None:
    rules = replace(RULES, zero_after_s=60.0, down_stabilization_s=30.0)
    nothing = demand(0.0)
    decisions = drive(rules, [demand(2.0)] * 4 + [nothing] * 10, (1, 1))
    assert (decisions[-1].prefill, decisions[-1].decode) == (0, 0)
    state = decisions[-1].state
    still = decide(rules, state, observe(400.0, (0, 0), nothing))
    assert (still.prefill, still.decode) == (0, 0)
    fresh = decide(rules, State(), observe(400.0, (0, 0), nothing))
    assert (fresh.prefill, fresh.decode) == (0, 0), "a new operator wakes nobody"
    woken = decide(rules, state, observe(400.0, (0, 0), nothing, held=1))
    assert (woken.prefill, woken.decode) == (1, 1)
    kept = decide(rules, state, observe(400.0, (0, 0), nothing, prefill_floor=3, decode_floor=3))
    assert (kept.prefill, kept.decode) == (3, 3)


def test_schedules_raise_the_minimum_and_say_so() -> None:
    seen = observe(PERIOD_S, (1, 1), demand(0.1), prefill_floor=3, decode_floor=2, floor_reason='"0 8 * * 1-5"')
    decision = decide(RULES, State(), seen)
    assert (decision.prefill, decision.decode) == (3, 2)
    assert "0 8 * * 1-5" in decision.reason


def test_a_schedule_that_a_budget_has_no_room_for_stops_nothing() -> None:
    """It is a wish then: what the load needs is still decided, and the status says what is in the way."""
    rules, floors = replace(RULES, gpus=5), {"prefill_floor": 4, "decode_floor": 4, "floor_reason": '"0 8 * * *"'}
    state, counts = State(), (1, 1)
    for number in range(40):
        decision = decide(rules, state, observe((number + 1) * PERIOD_S, counts, demand(0.5), **floors))
        counts, state = (decision.prefill, decision.decode), decision.state
    assert sum(counts) == 5, "as near to the schedule as the budget lets it come"
    assert "budget (5 GPUs)" in decision.limited
    ratio = replace(RULES, max_ratio_percent=100, decode_max=2)
    decision = decide(ratio, State(), observe(PERIOD_S, (1, 1), demand(0.5), prefill_floor=6))
    assert (decision.prefill, decision.decode) == (2, 2)
    assert "ratio" in decision.limited


def test_a_schedule_whose_pods_find_no_node_is_rolled_back_too() -> None:
    rules, state, now = replace(RULES, blocked_after_s=60.0), State(), PERIOD_S
    for _ in range(8):
        seen = observe(now, (3, 1), demand(0.5), prefill_floor=3)
        seen = replace(seen, prefill=replace(seen.prefill, ready=2, pending=1, pending_s=now))
        decision = decide(rules, state, seen)
        state, now = decision.state, now + PERIOD_S
        if decision.blocked:
            break
    assert (decision.prefill, decision.decode) == (2, 1)
    assert "at most 2" in decision.blocked


def test_the_reason_names_what_limits() -> None:
    heavy = [demand(90.0)] * 8
    assert "maximums" in drive(RULES, heavy)[-1].limited
    assert "3 GPUs" in drive(replace(RULES, gpus=3), heavy)[-1].limited
    assert "ratio" in drive(replace(RULES, prefill_max=20, decode_max=2, max_ratio_percent=100), heavy)[-1].limited


def test_contradicting_rules_change_nothing() -> None:
    rules = replace(RULES, prefill_min=8, min_ratio_percent=25, max_ratio_percent=50)
    decision = decide(rules, State(), observe(PERIOD_S, (2, 2), demand(1.0)))
    assert (decision.prefill, decision.decode) == (2, 2)
    assert "contradict" in decision.limited
