"""The status of a ScalingPolicy: conditions, the current decision with its reason, the last ten.

Owns: what each condition means and when a status is worth a write. Pure. Must not: decide counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from lanewise.policy.scaling_types import Decision, Observation, Rules
from lanewise.spec_scaling import ScalingDecision, ScalingPolicyStatus
from lanewise.spec_status import MAX_MESSAGE, Condition

KEPT = 10
CONDITIONS = ("Active", "Limited", "ScaleBlocked")


def previous_status(body: Mapping[str, Any]) -> ScalingPolicyStatus:
    """What stands in the cluster; one that cannot be read counts as none."""
    try:
        return ScalingPolicyStatus.model_validate(body.get("status") or {})
    except ValidationError:
        return ScalingPolicyStatus()


def inactive(
    previous: ScalingPolicyStatus, generation: int, reason: str, message: str, now: datetime
) -> ScalingPolicyStatus:
    """This policy does not scale, and why; what it decided before stays readable."""
    found = [
        ("Active", "False", reason, message),
        ("Limited", "Unknown", "Inactive", "this policy does not decide"),
        ("ScaleBlocked", "Unknown", "Inactive", "this policy does not decide"),
    ]
    return previous.model_copy(
        update={"observed_generation": generation, "conditions": _conditions(previous, generation, found, now)}
    )


def active(
    previous: ScalingPolicyStatus, generation: int, decision: Decision, seen: Observation, rules: Rules, now: datetime
) -> ScalingPolicyStatus:
    """The decision of this look. The history gets an entry when the counts change."""
    unknown = rules.watts is not None and not (seen.prefill.watts or seen.decode.watts)
    power = "; no worker reports its power: budget.watts is not enforced" if unknown else ""
    found = [
        ("Active", "True", "Deciding", f"scales both roles{power}"),
        ("Limited", "True", "Limited", decision.limited)
        if decision.limited
        else ("Limited", "False", "WithinRules", "the rules allow what is needed"),
        ("ScaleBlocked", "True", "PodsPending", decision.blocked)
        if decision.blocked
        else ("ScaleBlocked", "False", "NotBlocked", "every pod asked for could be scheduled, or still may be"),
    ]
    entry = entry_of(decision, now)
    changed = (decision.prefill, decision.decode) != (seen.prefill.desired, seen.decode.desired)
    history = [entry, *previous.history][:KEPT] if changed else previous.history
    return ScalingPolicyStatus(
        observed_generation=generation,
        conditions=_conditions(previous, generation, found, now),
        current=entry,
        history=history,
        summary=f"{decision.prefill}+{decision.decode}",
    )


def entry_of(decision: Decision, now: datetime) -> ScalingDecision:
    """The decision in words: what was seen, what it needs, what is done."""
    wanted = decision.wanted
    return ScalingDecision(
        time=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        prefill=decision.prefill,
        decode=decision.decode,
        inputs=", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in sorted(decision.facts.items())),
        requirement=f"{wanted.prefill} prefill + {wanted.decode} decode" if wanted is not None else "",
        reason=decision.reason[:MAX_MESSAGE],
    )


def worth_writing(previous: ScalingPolicyStatus, new: ScalingPolicyStatus, age_s: float, period_s: float) -> bool:
    """At once when a condition turns or counts change, else the current words at most every `period_s`."""

    def turns(status: ScalingPolicyStatus) -> list[tuple[str, str, str]]:
        return [(item.type, item.status, item.reason) for item in status.conditions]

    if turns(previous) != turns(new) or previous.summary != new.summary or previous.history != new.history:
        return True
    if previous.observed_generation != new.observed_generation:
        return True
    return previous != new and age_s >= period_s


def _conditions(
    previous: ScalingPolicyStatus, generation: int, found: list[tuple[str, str, str, str]], now: datetime
) -> list[Condition]:
    """`lastTransitionTime` moves only when the status does."""
    before = {item.type: item for item in previous.conditions}
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    made = []
    for kind, status, reason, message in found:
        old = before.get(kind)
        since = old.last_transition_time if old is not None and old.status == status else stamp
        made.append(
            Condition.model_validate(
                {
                    "type": kind,
                    "status": status,
                    "reason": reason,
                    "message": message[:MAX_MESSAGE],
                    "observedGeneration": generation,
                    "lastTransitionTime": since,
                }
            )
        )
    return made
