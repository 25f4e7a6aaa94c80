"""Scaling: one decision sets the counts of both roles, from demand, targets and rules.

Owns: the order of the rules (requirement, margin, stabilisation, zero, blocked pods, rate limits, one allocation) and
the memory between decisions. Must not: read clocks, count pods or write anything; equal arguments give equal decisions.

Whatever the requirement says, a decision keeps minimums, maximums, ratio and budgets; where they contradict each other
it keeps what is there and says so. Missing data changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, exp

from lanewise.policy.scaling_allocate import Bounds, allocate
from lanewise.policy.scaling_forecast import learn
from lanewise.policy.scaling_need import LEARN_FROM, MEMORY_S, Need, need
from lanewise.policy.scaling_steady import stabilised, with_margin, with_regrets
from lanewise.policy.scaling_types import Ceiling, Counts, Decision, Observation, RoleView, Rules, State

HISTORY_S = 1935.0  # of bins: the longest window of the forecast
LEAST_HISTORY_S = 60.0  # of demand before the first change, but for waking up
MINUTE_S = 60.0
LEAST_UP = 4  # workers that may be added in a minute however few there are
LEAST_DOWN = 1
MOST_BACKOFF_S = 3600.0


def decide(rules: Rules, state: State, seen: Observation) -> Decision:
    """The counts to ask for now. `state` is that of the last decision; nothing else is remembered."""
    here = Counts(seen.at_s, seen.prefill.desired, seen.decode.desired)
    if seen.demand.seconds <= 0:
        kept = replace(state, since_s=state.since_s if state.since_s is not None else seen.at_s)
        return Decision(here.prefill, here.decode, f"{_now(here)}; no router answered, nothing changes", kept)
    state = _remember(rules, state, seen)
    state = _note_blocked(rules, state, seen)
    wanted = need(rules, state, seen)
    state = _learn(rules, state, seen, wanted)
    if _sleeps(rules, state, seen):
        return _asleep(rules, state, seen)
    wish = with_margin(here, wanted)
    if sum(bin.seconds for bin in state.bins) < LEAST_HISTORY_S and here.prefill + here.decode > 0:
        wish = replace(wish, prefill=here.prefill, decode=here.decode)  # too little was seen to judge by
    state = replace(state, wishes=(*state.wishes, wish))
    steady = stabilised(rules, state, seen, wish)
    return with_regrets(_bounded(rules, state, seen, wanted, steady), seen, wanted)


# ---------------------------------------------------------------- memory


def _remember(rules: Rules, state: State, seen: Observation) -> State:
    """One more period of demand, and of what was late in it; what is too old is forgotten."""
    bins = (*state.bins, seen.demand)
    seconds = sum(bin.seconds for bin in bins)
    while len(bins) > 1 and seconds - bins[0].seconds > HISTORY_S:
        seconds -= bins[0].seconds
        bins = bins[1:]
    horizon = seen.at_s - max(rules.down_stabilization_s, rules.up_stabilization_s) - rules.period_s
    here = Counts(seen.at_s, seen.prefill.desired, seen.decode.desired)
    busy = seen.demand.requests > 0 or seen.running > 0 or seen.held > 0 or seen.queued_tokens > 0
    return replace(
        state,
        since_s=seen.at_s if state.since_s is None else state.since_s,
        bins=bins,
        season=learn(state.season, seen.at_s, seen.demand.seconds, seen.demand.requests),
        wishes=tuple(wish for wish in state.wishes if wish.at_s >= horizon),
        made=(*(made for made in state.made if made.at_s > seen.at_s - MINUTE_S), here),
        idle_since_s=None if busy else (seen.at_s if state.idle_since_s is None else state.idle_since_s),
    )


def _learn(rules: Rules, state: State, seen: Observation, wanted: Need) -> State:
    """What was late beside what the formulas expected, where they expected anything to speak of."""
    fade = exp(-seen.demand.seconds / MEMORY_S)
    if wanted.late_share >= LEARN_FROM * rules.late_share:
        state = replace(
            state,
            late_seen=state.late_seen * fade + seen.demand.ttft_late,
            late_expected=state.late_expected * fade + wanted.late_share * seen.demand.attainable,
        )
    late, finished = seen.demand.tpot_late, seen.demand.finished
    if wanted.slow_share < LEARN_FROM * rules.late_share:
        state = replace(
            state, calm_late=state.calm_late * fade + late, calm_finished=state.calm_finished * fade + finished
        )
    else:  # what is late in calm moments too, no worker more would bring in time
        state = replace(
            state,
            slow_seen=state.slow_seen * fade + late - finished * state.calm_late / max(state.calm_finished, 1.0),
            slow_expected=state.slow_expected * fade + wanted.slow_share * finished,
        )
    return state


def _note_blocked(rules: Rules, state: State, seen: Observation) -> State:
    """Ceilings where pods have been Pending too long; lifted when their time is over, forgotten when pods came up."""
    return replace(
        state,
        prefill_ceiling=_ceiling(rules, state.prefill_ceiling, seen.prefill, seen.at_s),
        decode_ceiling=_ceiling(rules, state.decode_ceiling, seen.decode, seen.at_s),
    )


def _ceiling(rules: Rules, before: Ceiling | None, role: RoleView, now: float) -> Ceiling | None:
    if role.pending > 0 and role.pending_s >= rules.blocked_after_s:
        count = max(role.desired - role.pending, 0)
        if before is not None and now < before.until_s:
            return replace(before, count=min(before.count, count))
        failures = 1 if before is None else before.failures + 1
        return Ceiling(count, now + min(rules.backoff_s * 2.0 ** (failures - 1), MOST_BACKOFF_S), failures)
    if before is not None and now >= before.until_s and role.pending == 0 and role.ready > before.count:
        return None
    return before


# ---------------------------------------------------------------- the steps


def _sleeps(rules: Rules, state: State, seen: Observation) -> bool:
    """Idle for long enough, or asleep already and nobody came."""
    if rules.zero_after_s is None or state.idle_since_s is None or seen.prefill_floor or seen.decode_floor:
        return False
    asleep = seen.prefill.desired == seen.decode.desired == 0
    return asleep or seen.at_s - state.idle_since_s >= rules.zero_after_s


def _asleep(rules: Rules, state: State, seen: Observation) -> Decision:
    here, nothing = Counts(seen.at_s, seen.prefill.desired, seen.decode.desired), Counts(seen.at_s, 0, 0)
    idle_s = seen.at_s - (state.idle_since_s or seen.at_s)
    words = f"no request for {idle_s:.0f} s (scaleToZero.after {rules.zero_after_s:.0f} s)"
    done = "stays at zero" if (here.prefill, here.decode) == (0, 0) else "both roles to zero"
    state = replace(state, wishes=(), made=(*state.made[:-1], nothing))
    return Decision(0, 0, f"{words}; {_now(here)}: {done}", state, wanted=nothing)


def _bounded(rules: Rules, state: State, seen: Observation, wanted: Need, steady: Counts) -> Decision:
    """The requirement within rules and rate limits; where the limits leave nothing allowed, the rules alone."""
    here = Counts(seen.at_s, seen.prefill.desired, seen.decode.desired)
    bounds = bounds_of(rules, state, seen)
    wishes = max(steady.prefill, bounds.prefill[0]), max(steady.decode, bounds.decode[0])
    if allocate(bounds, *wishes) is None:  # a schedule is a wish where budgets or the ratio leave no room for it
        bounds = bounds_of(rules, state, replace(seen, prefill_floor=0, decode_floor=0))
    found = allocate(_rate_limited(rules, state, seen, bounds), *wishes)
    if found is None:
        found = allocate(bounds, *wishes)
    if found is None:  # a budget already used up by pods that leave: shrinking is all that is possible now
        smaller = replace(bounds, prefill=(bounds.prefill[0], min(bounds.prefill[1], here.prefill)))
        found = allocate(replace(smaller, decode=(bounds.decode[0], min(bounds.decode[1], here.decode))), *wishes)
    blocked = _blocked_words(state, seen.at_s)
    if found is None:
        reason = f"{wanted.words}; {_now(here)}; the rules allow no pair of counts, nothing changes"
        return Decision(
            here.prefill, here.decode, reason, state, "rules contradict each other", blocked, facts=wanted.facts
        )
    limited = _limits(rules, seen, bounds, wishes, found, wanted)
    parts = [wanted.words, _now(here)]
    if seen.floor_reason and (seen.prefill_floor or seen.decode_floor):
        parts.append(f"schedule {seen.floor_reason}: at least {seen.prefill_floor} + {seen.decode_floor}")
    parts += [text for text in (blocked, limited) if text]
    done = "stays" if found == (here.prefill, here.decode) else f"to {found[0]} prefill + {found[1]} decode"
    reason = "; ".join(parts) + f": {done}"
    requirement = Counts(seen.at_s, wanted.prefill, wanted.decode)
    return Decision(*found, reason, state, limited, blocked, requirement, wanted.facts)


def bounds_of(rules: Rules, state: State, seen: Observation) -> Bounds:
    """The rules as bounds on both counts; ceilings of blocked roles lower maximums, schedules raise minimums."""
    waking = int(seen.prefill.desired == seen.decode.desired == 0)  # both roles wake together
    least_p = min(max(rules.prefill_min, waking), rules.prefill_max)
    least_d = min(max(rules.decode_min, waking), rules.decode_max)
    most_p = _most(rules.prefill_max, least_p, state.prefill_ceiling, seen.at_s)
    most_d = _most(rules.decode_max, least_d, state.decode_ceiling, seen.at_s)
    least_p = max(least_p, min(seen.prefill_floor, most_p))
    least_d = max(least_d, min(seen.decode_floor, most_d))
    p, d = seen.prefill, seen.decode
    return Bounds(
        (least_p, most_p),
        (least_d, most_d),
        (rules.min_ratio_percent, rules.max_ratio_percent) if rules.prefill_max else (0, 0),
        rules.gpus,
        rules.watts,
        p.gpus,
        d.gpus,
        p.watts,
        d.watts,
        (p.desired, d.desired),
        (p.terminating, d.terminating),
    )


def _most(most: int, least: int, ceiling: Ceiling | None, now: float) -> int:
    if ceiling is None or now >= ceiling.until_s:
        return most
    return max(min(most, ceiling.count), least)


def _rate_limited(rules: Rules, state: State, seen: Observation, bounds: Bounds) -> Bounds:
    """Bounds narrowed to what a minute may change, from the counts of the last minute."""
    ranges = []
    for role, (low, high) in (("prefill", bounds.prefill), ("decode", bounds.decode)):
        past = [getattr(made, role) for made in state.made]
        fewest, most = min(past), max(past)
        up = fewest + max(ceil(fewest * rules.up_per_minute), LEAST_UP)
        down = most - max(int(most * rules.down_per_minute), LEAST_DOWN)
        ranges.append((max(low, min(down, high)), min(high, max(up, low))))
    return replace(bounds, prefill=ranges[0], decode=ranges[1])


# ---------------------------------------------------------------- words


def _now(here: Counts) -> str:
    return f"now {here.prefill} prefill + {here.decode} decode"


def _blocked_words(state: State, now: float) -> str:
    found = (("prefill", state.prefill_ceiling), ("decode", state.decode_ceiling))
    return ", ".join(
        f"{name} pods could not be scheduled: at most {ceiling.count} for another {ceiling.until_s - now:.0f} s "
        f"(failure {ceiling.failures})"
        for name, ceiling in found
        if ceiling is not None and now < ceiling.until_s
    )


def _limits(
    rules: Rules, seen: Observation, bounds: Bounds, wishes: tuple[int, int], found: tuple[int, int], wanted: Need
) -> str:
    """Which rule kept the decision from the requirement, in the order in which they bite; empty where none did."""
    if found[0] >= max(wanted.prefill, seen.prefill_floor) and found[1] >= max(wanted.decode, seen.decode_floor):
        return ""
    most = min(wishes[0], bounds.prefill[1]), min(wishes[1], bounds.decode[1])
    if wishes != most and found[0] >= most[0] and found[1] >= most[1]:
        return f"limited by the maximums ({bounds.prefill[1]} prefill, {bounds.decode[1]} decode)"
    if not bounds.within_budget(*most):
        terminating = seen.prefill.terminating + seen.decode.terminating
        extra = f", {terminating} pods on their way out counted" if terminating else ""
        budget = [f"{rules.gpus} GPUs" if rules.gpus is not None else "", f"{rules.watts} W" if rules.watts else ""]
        return f"limited by the budget ({', '.join(filter(None, budget))}{extra})"
    if not bounds.within_ratio(*most):
        return f"limited by the ratio ({rules.min_ratio_percent}–{rules.max_ratio_percent} %)"
    if wishes[0] < wanted.prefill or wishes[1] < wanted.decode:
        return "waits for the stabilisation window"
    return "limited by the rate of change"
