"""When a wish becomes a change: margin, stabilisation windows, and what was learned from steps taken back.

Owns: what keeps counts from going to and fro. Must not: know requirements' reasons, budgets or ratios.

Up is immediate (but for its window). Down waits for three things. Margin: the load must be able to rise again by what
chance may have hidden. Window: the most that was wanted within it. Regret: a step that was taken back although the load
had not grown is tried again after an hour, then two, four ...: whatever the formulas think, that count is too small.
"""

from __future__ import annotations

from dataclasses import replace

from lanewise.policy.scaling_need import Need
from lanewise.policy.scaling_types import Counts, Decision, Observation, Rules, State, Tried

REGRET_S = 900.0  # after a step down in which going up again means that it was wrong
RETRY_S = 3600.0  # the first; doubles
MOST_FAILURES = 8


def with_margin(here: Counts, wanted: Need) -> Counts:
    """Up as soon as it is needed; down only to what would be needed with a margin on the load."""
    prefill = wanted.prefill if wanted.prefill > here.prefill else min(here.prefill, wanted.prefill_keep)
    decode = wanted.decode if wanted.decode > here.decode else min(here.decode, wanted.decode_keep)
    return Counts(here.at_s, prefill, decode)


def stabilised(rules: Rules, state: State, seen: Observation, wish: Counts) -> Counts:
    """Up: the least wish of its window. Down: the most of its window, and nothing before that window has been seen."""
    now, counts = seen.at_s, []
    young = now - (state.since_s if state.since_s is not None else now) < rules.down_stabilization_s
    for role, here, wanted, tried in (
        ("prefill", seen.prefill.desired, wish.prefill, state.prefill_tried),
        ("decode", seen.decode.desired, wish.decode, state.decode_tried),
    ):
        if wanted > here:
            window = [getattr(w, role) for w in state.wishes if w.at_s >= now - rules.up_stabilization_s]
            counts.append(max(min(window), here))
        else:
            window = [getattr(w, role) for w in state.wishes if w.at_s >= now - rules.down_stabilization_s]
            least = tried.count + 1 if tried is not None and now < tried.until_s else 0
            counts.append(here if young else min(max([least, *window]), here))
    return Counts(now, *counts)


def with_regrets(decision: Decision, seen: Observation, wanted: Need) -> Decision:
    """The decision, with what its state must know of steps down."""
    state, now = decision.state, seen.at_s
    prefill = _tried(state.prefill_tried, now, seen.prefill.desired, decision.prefill, wanted.prefill_load)
    decode = _tried(state.decode_tried, now, seen.decode.desired, decision.decode, wanted.decode_load)
    return replace(decision, state=replace(state, prefill_tried=prefill, decode_tried=decode))


def _tried(before: Tried | None, now: float, here: int, count: int, load: float) -> Tried | None:
    near = 0.5 / (before.count + 1) if before else 0.0  # half a worker's share of the load
    if before and load < before.load * (1 - near):
        before = None
    if count < here:
        return Tried(now, count, load, before.failures if before else 0)
    if before is None or count <= here or now - before.at_s > REGRET_S or load > before.load * (1 + near):
        return before
    failures = min(before.failures + 1, MOST_FAILURES)
    return Tried(now - 2 * REGRET_S, before.count, load, failures, now + RETRY_S * 2.0 ** (failures - 1))
