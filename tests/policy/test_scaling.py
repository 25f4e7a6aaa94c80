"""Scaling decisions: bounds that hold whatever comes, monotone in load, still under constant load, pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.policy.profile import make_profile
from lanewise.policy.scaling import decide
from lanewise.policy.scaling_allocate import Bounds, allocate
from lanewise.policy.scaling_capacity import late_share, prefill_work
from lanewise.policy.scaling_need import PRIOR
from lanewise.policy.scaling_types import Counts, Decision, Demand, Observation, RoleView, Rules, State

PROFILE = make_profile("qwen2.5-32b", "h200", 1)
ROLE = RoleView(1, 1, cost=PROFILE.cost, kv_capacity_tokens=PROFILE.kv_capacity_tokens, watts=700.0)
RULES = Rules(1, 8, 1, 8, ttft_s=1.0, tpot_s=0.05)
PERIOD_S = 15.0


def demand(rate: float, prompt: float = 1100.0, output: float = 200.0, seconds: float = PERIOD_S) -> Demand:
    """Steady requests of about these lengths."""
    count = rate * seconds
    return Demand(
        seconds=seconds,
        requests=count,
        prompt_tokens=count * prompt,
        prompt_squares=count * prompt * prompt * 2,
        uncached_tokens=count * prompt,
        uncached_squares=count * prompt * prompt * 2,
        attended=count * prompt * prompt,
        output_tokens=count * output,
        finished=count,
        attainable=count,
    )


def observe(at_s: float, counts: tuple[int, int], load: Demand, **changes: object) -> Observation:
    prefill, decode = (replace(ROLE, desired=n, ready=n) for n in counts)
    return replace(Observation(at_s, load, prefill, decode), **changes)  # type: ignore[arg-type]


def drive(rules: Rules, loads: list[Demand], counts: tuple[int, int] = (1, 1)) -> list[Decision]:
    """Decisions in a row; pods are up at once."""
    state, found = State(), []
    for number, load in enumerate(loads):
        decision = decide(rules, state, observe((number + 1) * PERIOD_S, counts, load))
        counts, state = (decision.prefill, decision.decode), decision.state
        found.append(decision)
    return found


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    """Rules that at least one pair of counts satisfies."""
    p, d = draw(st.integers(1, 12)), draw(st.integers(1, 12))  # this pair does
    ratio = 100 * p // d
    gpus = draw(st.none() | st.integers(p + d, 30))
    watts = draw(st.none() | st.integers((p + d) * 700, 30_000))
    return replace(
        RULES,
        prefill_min=draw(st.integers(1, p)),
        prefill_max=draw(st.integers(p, 15)),
        decode_min=draw(st.integers(1, d)),
        decode_max=draw(st.integers(d, 15)),
        min_ratio_percent=draw(st.integers(0, ratio)),
        max_ratio_percent=draw(st.integers(ratio + 1, 2000)),
        gpus=gpus,
        watts=watts,
        up_per_minute=draw(st.sampled_from([0.1, 1.0, 10.0])),
        zero_after_s=draw(st.none() | st.just(45.0)),
    )


loads = st.builds(
    demand,
    st.floats(0, 200) | st.just(0.0),
    prompt=st.floats(1, 20_000),
    output=st.floats(1, 2000),
)


def within(rules: Rules, decision: Decision) -> bool:
    p, d = decision.prefill, decision.decode
    if (p, d) == (0, 0):
        return rules.zero_after_s is not None
    return (
        rules.prefill_min <= p <= rules.prefill_max
        and rules.decode_min <= d <= rules.decode_max
        and (rules.gpus is None or p + d <= rules.gpus)
        and (rules.watts is None or (p + d) * 700 <= rules.watts)
        and rules.min_ratio_percent * d <= 100 * p <= rules.max_ratio_percent * d
    )


@given(rules(), st.lists(loads, min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=60)
def test_never_outside_the_rules(rules: Rules, load: list[Demand], data: st.DataObject) -> None:
    state, counts = State(), (rules.prefill_min, rules.decode_min)
    first = allocate(Bounds((1, 15), (1, 15)), *counts)
    assert first == counts
    inside = False
    for number, item in enumerate(load):
        extra = {
            "queued_tokens": data.draw(st.floats(0, 1e6)),
            "running": data.draw(st.floats(0, 1e4)),
            "held": data.draw(st.integers(0, 50)),
            "prefill_floor": data.draw(st.integers(0, 20)),
            "decode_floor": data.draw(st.integers(0, 20)),
        }
        if extra["prefill_floor"] or extra["decode_floor"]:  # a schedule that contradicts the ratio is no promise
            extra |= {"prefill_floor": 0, "decode_floor": 0}
        decision = decide(rules, state, observe((number + 1) * PERIOD_S, counts, item, **extra))
        inside = inside or within(rules, decision)
        # Where the start is outside the rules, the way in may be blocked by pods that still hold their GPUs;
        # from the first decision inside on, none is outside.
        assert within(rules, decision) or not inside, decision.reason
        counts, state = (decision.prefill, decision.decode), decision.state
    assert inside


@given(rules(), loads, st.integers(0, 15), st.integers(0, 15), st.integers(0, 6), st.integers(0, 6))
@settings(deadline=None, max_examples=60)
def test_gpus_held_never_exceed_the_budget(rules: Rules, load: Demand, p: int, d: int, tp: int, td: int) -> None:
    """What is asked for, beside what was there and what still terminates, fits the budget, or nothing grows."""
    seen = observe(PERIOD_S, (p, d), load)
    seen = replace(seen, prefill=replace(seen.prefill, terminating=tp), decode=replace(seen.decode, terminating=td))
    decision = decide(rules, State(), seen)
    held = max(decision.prefill, p) + max(decision.decode, d) + tp + td
    grows = decision.prefill > p or decision.decode > d
    assert not grows or rules.gpus is None or held <= rules.gpus
    assert not grows or rules.watts is None or held * 700 <= rules.watts


@given(loads, st.floats(1.0, 5.0), rules())
@settings(deadline=None, max_examples=60)
def test_more_load_never_needs_less(load: Demand, factor: float, rules: Rules) -> None:
    """Scaled in time (the same requests, faster): each role's count does not fall; unbounded by budgets."""
    rules = replace(rules, gpus=None, watts=None)
    names = [name for name in Demand.__dataclass_fields__ if name != "seconds"]
    more = replace(load, **{name: getattr(load, name) * factor for name in names})
    few, many = (drive(rules, [item] * 8, (rules.prefill_min, rules.decode_min))[-1] for item in (load, more))
    assert few.wanted is not None
    assert many.wanted is not None
    assert many.wanted.prefill >= few.wanted.prefill
    assert many.wanted.decode >= few.wanted.decode
    assert many.prefill >= few.prefill
    assert many.decode >= few.decode


@given(st.floats(0.05, 120), st.floats(10, 8000), st.floats(1, 1000), st.integers(1, 8), st.integers(1, 8))
@settings(deadline=None, max_examples=20)
def test_constant_load_never_oscillates(rate: float, prompt: float, output: float, p: int, d: int) -> None:
    """With as many late prompts as such a service has: the correction has nothing to learn."""
    load, state, counts, decisions = demand(rate, prompt, output), State(), (p, d), []
    sums = (load.requests, load.uncached_tokens, load.uncached_squares, load.attended)
    work = prefill_work(PROFILE.cost, RULES.ttft_s, *sums)
    for number in range(80):
        late = PRIOR * late_share(counts[0], rate * work.mean_s, work, RULES.ttft_s) * load.attainable
        decision = decide(RULES, state, observe((number + 1) * PERIOD_S, counts, replace(load, ttft_late=late)))
        counts, state = (decision.prefill, decision.decode), decision.state
        decisions.append(decision)
    for role in ("prefill", "decode"):
        counts = [getattr(decision, role) for decision in decisions]
        rises = any(b > a for a, b in pairwise(counts))
        falls = any(b < a for a, b in pairwise(counts))
        assert not (rises and falls), counts
        assert len(set(counts[-20:])) == 1


@given(rules(), st.lists(loads, min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_a_decision_is_a_function_of_its_inputs(rules: Rules, load: list[Demand]) -> None:
    assert drive(rules, load) == drive(rules, load)


def test_the_right_role_grows() -> None:
    quiet = [demand(1.0, 500, 50)] * 60
    long_prompts = drive(RULES, [*quiet, *[demand(8.0, 4000, 10)] * 8])
    long_outputs = drive(RULES, [*quiet, *[demand(20.0, 100, 1500)] * 20])
    assert (long_prompts[-1].prefill, long_prompts[-1].decode) == (5, 2)  # at most 400 %: decode follows
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


@given(st.integers(0, 12), st.integers(0, 12), rules())
@settings(deadline=None, max_examples=100)
def test_allocation_is_the_best_of_all_pairs(p: int, d: int, rules: Rules) -> None:
    """Against brute force over every pair."""
    bounds = Bounds(
        (rules.prefill_min, rules.prefill_max),
        (rules.decode_min, rules.decode_max),
        (rules.min_ratio_percent, rules.max_ratio_percent),
        rules.gpus,
        rules.watts,
        prefill_watts=700,
        decode_watts=700,
    )
    pairs = [(a, b) for a in range(16) for b in range(16) if bounds.allows(a, b)]

    def rank(pair: tuple[int, int]) -> tuple[float, float, int]:
        shares = [min(have / want, 1.0) if want else 1.0 for have, want in zip(pair, (p, d), strict=True)]
        return min(shares), sum(shares), -sum(pair)

    found = allocate(bounds, p, d)
    assert found is not None
    assert found in pairs
    assert rank(found) == pytest.approx(max(map(rank, pairs)))


def test_counts_are_plain_records() -> None:
    assert Counts(1.0, 2, 3) == Counts(1.0, 2, 3)
