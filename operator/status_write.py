"""When a new status is worth a write, and which changes are worth an Event. Pure.

Owns: the budget of docs/design.md §8: what happened is written at once, numbers at most every 30 s and only when they
moved by more than 10 %. Must not: write.
"""

from __future__ import annotations

import re
from typing import Any

from lanewise.spec_status import Condition, LLMServiceStatus

WORTH = 0.10
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
EVENTFUL = ("Ready", "Degraded", "Progressing")


def worth_writing(previous: LLMServiceStatus, new: LLMServiceStatus, age_s: float, period_s: float) -> bool:
    """`age_s`: since this operator last wrote this status (infinite where it never did)."""
    old_words, old_numbers = _split(previous)
    words, numbers = _split(new)
    if words != old_words:
        return True
    return age_s >= period_s and _moved(old_numbers, numbers)


def _split(status: LLMServiceStatus) -> tuple[Any, list[float]]:
    """What happened, and the numbers that only say how much."""
    data = status.model_dump(by_alias=True, exclude_none=True)
    numbers: list[float] = []

    def blank(text: str) -> str:
        numbers.extend(float(found) for found in _NUMBER.findall(text))
        return _NUMBER.sub("#", text)

    for condition in data.get("conditions", []):
        condition["message"] = blank(condition.get("message", ""))
    for lane in data.get("lanes", []):
        lane["ttftP99"] = blank(lane.get("ttftP99", ""))
        numbers.append(float(lane.pop("maxTokens", 0)))
    return data, numbers


def _moved(old: list[float], new: list[float]) -> bool:
    if len(old) != len(new):
        return True
    return any(abs(a - b) > WORTH * max(abs(a), abs(b)) for a, b in zip(old, new, strict=True))


def eventful(previous: LLMServiceStatus, new: LLMServiceStatus) -> list[Condition]:
    """Conditions whose turn a person would want to read about: sparse, so never for mere words or numbers."""
    before = {item.type: item for item in previous.conditions}
    found = []
    for condition in new.conditions:
        old = before.get(condition.type)
        if condition.type not in EVENTFUL:
            continue
        turned = old is None or old.status != condition.status
        worse = condition.type == "Degraded" and condition.status == "True" and old and old.reason != condition.reason
        if (turned and not (old is None and condition.status != "True")) or worse:
            found.append(condition)
    return found


def event_of(service: dict[str, Any], condition: Condition, instance: str, stamp: str, suffix: str) -> dict[str, Any]:
    """A core/v1 Event about a service."""
    metadata = service["metadata"]
    bad = (condition.type == "Degraded") == (condition.status == "True") and condition.type != "Progressing"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{suffix}", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": service["apiVersion"],
            "kind": service["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
        "type": "Warning" if bad else "Normal",
        "reason": condition.reason,
        "message": f"{condition.type} is {condition.status}: {condition.message}"[:1024],
        "source": {"component": "lanewise-operator"},
        "reportingComponent": "lanewise.io/operator",
        "reportingInstance": instance[:128],
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
