"""When a wish becomes a change: margin and stabilisation windows.

Owns: what keeps counts from going to and fro. Must not: know requirements' reasons, budgets or ratios.

Up is immediate (but for its window). Down waits for two things. Margin: the load must be able to rise again by what
chance may have hidden. Window: the most that was wanted within it.
"""

from __future__ import annotations

from lanewise.policy.scaling_need import Need
from lanewise.policy.scaling_types import Counts, Observation, Rules, State


def with_margin(here: Counts, wanted: Need) -> Counts:
    """Up as soon as it is needed; down only to what would be needed with a margin on the load."""
    prefill = wanted.prefill if wanted.prefill > here.prefill else min(here.prefill, wanted.prefill_keep)
    decode = wanted.decode if wanted.decode > here.decode else min(here.decode, wanted.decode_keep)
    return Counts(here.at_s, prefill, decode)


def stabilised(rules: Rules, state: State, seen: Observation, wish: Counts) -> Counts:
    """Up: the least wish of its window. Down: the most of its window, and nothing before that window has been seen."""
    now, counts = seen.at_s, []
    young = now - (state.since_s if state.since_s is not None else now) < rules.down_stabilization_s
    for role, here, wanted in (
        ("prefill", seen.prefill.desired, wish.prefill),
        ("decode", seen.decode.desired, wish.decode),
    ):
        if wanted > here:
            window = [getattr(w, role) for w in state.wishes if w.at_s >= now - rules.up_stabilization_s]
            counts.append(max(min(window), here))
        else:
            window = [getattr(w, role) for w in state.wishes if w.at_s >= now - rules.down_stabilization_s]
            counts.append(here if young else min(max(window), here))
    return Counts(now, *counts)
