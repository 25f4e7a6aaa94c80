"""The ScalingPolicy resource (`lanewise.io/v1alpha1`): how many workers of each role a service may have, and when.

Owns: fields, defaults, limits and rules, as spec.py does for LLMService.
Must not: decide anything about scale (policy/scaling.py does).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from lanewise.spec_model import EachRule, Metadata, Model, Rule
from lanewise.spec_status import MAX_MESSAGE, Condition
from lanewise.spec_types import CRON, Duration, PositiveDuration, ServiceName


class TargetRef(Model):
    """The service that is scaled."""

    name: ServiceName = Field(description="an LLMService in the same namespace")


class _Range(Model):
    min: int
    max: int

    rules = (
        Rule(
            "min",
            "expected at most max ({self.max}), got {self.min}",
            "self.min <= self.max",
            lambda self: self.min <= self.max,
        ),
    )


class PrefillRange(_Range):
    """Bounds on prefill workers."""

    min: int = Field(default=1, ge=0, le=1000, description="fewest workers")
    max: int = Field(ge=0, le=1000, description="most workers")


class DecodeRange(_Range):
    """Bounds on decode workers."""

    min: int = Field(default=1, ge=1, le=1000, description="fewest workers while there is work")
    max: int = Field(ge=1, le=1000, description="most workers")


class Budget(Model):
    """Bounds on both roles together."""

    gpus: int | None = Field(default=None, ge=1, le=100_000, description="most GPUs")
    watts: int | None = Field(default=None, ge=1, le=100_000_000, description="most electric power")


class Ratio(Model):
    """Bounds on prefill workers per 100 decode workers."""

    min_prefill_percent_of_decode: int = Field(default=25, ge=0, le=10_000, description="fewest")
    max_prefill_percent_of_decode: int = Field(default=400, ge=1, le=10_000, description="most")

    rules = (
        Rule(
            "minPrefillPercentOfDecode",
            "expected at most maxPrefillPercentOfDecode ({self.max_prefill_percent_of_decode})"
            ", got {self.min_prefill_percent_of_decode}",
            "self.minPrefillPercentOfDecode <= self.maxPrefillPercentOfDecode",
            lambda self: self.min_prefill_percent_of_decode <= self.max_prefill_percent_of_decode,
        ),
    )


class ScaleUp(Model):
    """How counts grow."""

    stabilization: Duration = Field(default=Duration("0s"), description="the least wanted in this time counts")
    blocked_after: PositiveDuration = Field(
        default=PositiveDuration("15m"), description="pods Pending this long roll a decision back"
    )


class ScaleDown(Model):
    """How counts shrink."""

    stabilization: Duration = Field(default=Duration("300s"), description="the most wanted in this time counts")


class Behavior(Model):
    """How fast counts change."""

    scale_up: ScaleUp = Field(default=ScaleUp(), description="how counts grow")
    scale_down: ScaleDown = Field(default=ScaleDown(), description="how counts shrink")


class PrefillFloor(Model):
    """A raised minimum."""

    min: int = Field(ge=0, le=1000, description="fewest prefill workers in that time")


class DecodeFloor(Model):
    """A raised minimum."""

    min: int = Field(ge=1, le=1000, description="fewest decode workers in that time")


class Schedule(Model):
    """Raised minimums from each time `cron` fires, for `duration`."""

    cron: str = Field(pattern=CRON, max_length=128, description="minute, hour, day, month, weekday; UTC")
    duration: PositiveDuration = Field(description="how long the minimums are raised")
    prefill: PrefillFloor | None = Field(default=None, description="raised minimum of prefill workers")
    decode: DecodeFloor | None = Field(default=None, description="raised minimum of decode workers")

    rules = (
        Rule(
            "",
            "expected prefill or decode with a min",
            "has(self.prefill) || has(self.decode)",
            lambda self: self.prefill is not None or self.decode is not None,
            "FieldValueRequired",
        ),
    )


class ScaleToZero(Model):
    """When there is nothing to do."""

    after: PositiveDuration = Field(default=PositiveDuration("15m"), description="how long without a request")
    max_hold: Duration = Field(default=Duration("10m"), description="how long a request may wait for the first worker")


def _floor(role: str) -> EachRule:
    return EachRule(
        "schedules",
        f"expected {role}.min of at most spec.{role}.max ({{self.{role}.max}})",
        f"self.schedules.all(s, !has(s.{role}) || s.{role}.min <= self.{role}.max)",
        lambda self: [
            (index, role, "min")
            for index, schedule in enumerate(self.schedules)
            if (floor := getattr(schedule, role)) is not None and floor.min > getattr(self, role).max
        ],
    )


class ScalingPolicySpec(Model):
    """What is wanted."""

    target_ref: TargetRef = Field(description="the service that is scaled")
    prefill: PrefillRange = Field(description="bounds on prefill workers")
    decode: DecodeRange = Field(description="bounds on decode workers")
    budget: Budget = Field(default=Budget(), description="bounds on both roles together")
    ratio: Ratio = Field(default=Ratio(), description="bounds on prefill workers per 100 decode workers")
    behavior: Behavior = Field(default=Behavior(), description="how fast counts change")
    schedules: list[Schedule] = Field(default=[], max_length=32, description="raised minimums at given times")
    scale_to_zero: ScaleToZero | None = Field(default=None, description="omitted: never below the minimums")

    rules = (
        _floor("prefill"),
        _floor("decode"),
        Rule(
            "budget.gpus",
            "expected at least prefill.min + decode.min, got {self.budget.gpus}",
            "!has(self.budget.gpus) || self.prefill.min + self.decode.min <= self.budget.gpus",
            lambda self: self.budget.gpus is None or self.prefill.min + self.decode.min <= self.budget.gpus,
        ),
    )


class ScalingPolicy(Model):
    """The one writer of both roles' counts of a service."""

    api_version: Literal["lanewise.io/v1alpha1"]
    kind: Literal["ScalingPolicy"]
    metadata: Metadata
    spec: ScalingPolicySpec
    status: dict[str, Any] | None = Field(default=None, description="written by the operator, ignored everywhere else")


class ScalingDecision(Model):
    """One decision: what was seen, what that needs, what was done."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    prefill: int = Field(ge=0, description="prefill workers asked for")
    decode: int = Field(ge=0, description="decode workers asked for")
    inputs: str = Field(default="", max_length=1024, description="the numbers it rests on")
    requirement: str = Field(default="", max_length=256, description="what they need, before any rule")
    reason: str = Field(default="", max_length=MAX_MESSAGE, description="inputs, requirement and decision in words")


class ScalingPolicyStatus(Model):
    """What was observed: `Active` is False where another policy or autoscaler owns the counts."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    observed_generation: int = Field(default=0, description="generation of the spec that was last looked at")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="observations by type: Active, Limited, ScaleBlocked",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    current: ScalingDecision | None = Field(default=None, description="the newest decision")
    history: list[ScalingDecision] = Field(
        default_factory=list, max_length=10, description="the last decisions that changed a count, newest first"
    )
    summary: Annotated[str, Field(max_length=32, description="prefill+decode")] = ""
