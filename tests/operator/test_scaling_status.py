"""What a ScalingPolicy says: rules and schedules read, conditions, the current decision and the last ten. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lanewise.errors import ConfigError
from lanewise.operator.scaling_status import active, inactive, worth_writing
from lanewise.operator.scaling_view import Memory
from lanewise.policy.scaling import decide
from lanewise.policy.scaling_types import Decision, State
from lanewise.scaling_rules import floors_at, rules_of
from lanewise.spec_scaling import ScalingPolicyStatus
from tests.operator.scaling_cases import NOW, known, look, pod, reply, spec


def test_schedules_are_active_for_their_duration_in_utc() -> None:
    working = {"cron": "0 8 * * 1-5", "duration": "10h", "prefill": {"min": 3}}
    weekend = {"cron": "0 0 * * 6", "duration": "48h", "decode": {"min": 2}}
    found = spec(schedules=[working, weekend])
    assert floors_at(found, NOW) == (3, 0, '"0 8 * * 1-5"')
    assert floors_at(found, NOW.replace(hour=8)) == (3, 0, '"0 8 * * 1-5"')  # from the very second
    assert floors_at(found, NOW.replace(hour=7, minute=59)) == (0, 0, "")
    assert floors_at(found, NOW.replace(hour=18)) == (0, 0, "")
    assert floors_at(found, datetime(2026, 3, 8, 23, 59, tzinfo=UTC)) == (0, 2, '"0 0 * * 6"')
    with pytest.raises(ConfigError, match="expected five cron fields"):
        floors_at(spec(schedules=[working | {"cron": "99 8 * * 1"}]), NOW)


def test_the_last_ten_decisions_that_changed_a_count_newest_first() -> None:
    rules, status = rules_of(spec(), 1.0, 0.05, 15.0), ScalingPolicyStatus()
    seen = look(known(), [reply("a")], Memory())
    for number in range(14):
        count = number % 3 + 1  # the third of each three changes nothing
        decision = Decision(count, 1, f"decision {number}", State())
        here = replace(seen.prefill, desired=3 if count == 3 else 5)
        status = active(status, 1, decision, replace(seen, prefill=here), rules, NOW + timedelta(seconds=number))
    assert [entry.reason for entry in status.history] == [f"decision {n}" for n in (13, 12, 10, 9, 7, 6, 4, 3, 1, 0)]
    status = active(status, 1, Decision(2, 1, "one more", State()), seen, rules, NOW)
    assert len(status.history) == 10
    assert status.history[0].reason == "one more"
    assert status.history[-1].reason == "decision 1"


def test_limits_and_blocked_pods_are_conditions_with_their_words() -> None:
    seen = look(known(), [reply("a")], Memory())
    decision = Decision(1, 1, "why", State(), limited="limited by the budget (4 GPUs)", blocked="prefill pods ...")
    watts = rules_of(spec(budget={"watts": 700}), 1.0, 0.05, 15.0)
    found = {c.type: c for c in active(ScalingPolicyStatus(), 1, decision, seen, watts, NOW).conditions}
    told = {name: (c.status, c.reason, c.message) for name, c in found.items()}
    assert told["Limited"] == ("True", "Limited", "limited by the budget (4 GPUs)")
    assert told["ScaleBlocked"] == ("True", "PodsPending", "prefill pods ...")
    assert told["Active"][:2] == ("True", "Deciding")
    assert "budget.watts is not enforced" in told["Active"][2], "no worker has NVML"


def test_the_defaults_are_those_of_the_design() -> None:
    rules = rules_of(spec(), 1.0, 0.05, 15.0)
    assert (rules.blocked_after_s, rules.down_stabilization_s, rules.up_stabilization_s) == (900.0, 300.0, 0.0)
    assert (rules.min_ratio_percent, rules.max_ratio_percent) == (25, 400)
    assert rules.zero_after_s is None
    zero = spec(scaleToZero={}).scale_to_zero
    assert zero is not None
    assert (zero.after.seconds, zero.max_hold.seconds) == (900.0, 600.0)


def test_status_tells_conditions_decision_and_history() -> None:
    memory = Memory()
    look(known(pod("prefill", "p0"), pod("decode", "d0")), [reply("a", 0)], memory, 100.0)
    state, status, counts = State(), ScalingPolicyStatus(), []
    rules = rules_of(spec(), 1.0, 0.05, 15.0)
    for number in range(1, 14):
        found = known(pod("prefill", "p0"), pod("decode", "d0"), prefill=number % 2 + 1)
        seen = look(found, [reply("a", 600.0 * number)], memory, 100.0 + 15 * number)
        decision = decide(rules, state, seen)
        state = decision.state
        status = active(status, 7, decision, seen, rules, NOW)
        counts.append((decision.prefill, decision.decode))
    conditions = {item.type: item for item in status.conditions}
    assert [conditions[name].status for name in ("Active", "Limited", "ScaleBlocked")] == ["True", "False", "False"]
    assert status.current is not None
    assert (status.current.prefill, status.current.decode) == counts[-1]
    assert "requests/s" in status.current.reason
    assert "requests per s" in status.current.inputs
    assert status.summary == f"{counts[-1][0]}+{counts[-1][1]}"
    gone = inactive(status, 8, "Conflict", "HPA x and ScalingPolicy chat", NOW + timedelta(hours=1))
    assert gone.conditions[0].status == "False"
    assert gone.conditions[0].last_transition_time == "2026-03-02T10:00:00Z"
    assert gone.history == status.history
    assert worth_writing(status, gone, 0.0, 30.0)
    assert not worth_writing(gone, gone, 1e9, 30.0)
