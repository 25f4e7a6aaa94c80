"""The ScalingPolicy resource (`lanewise.io/v1alpha1`): how many workers of each role a service may have, and when.

Owns: fields, defaults, limits and rules, as spec.py does for LLMService.
Must not: decide anything about scale (policy/scaling.py does).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from lanewise.spec import Metadata, Model, Problem
from lanewise.spec_types import CRON, Duration, ServiceName


class TargetRef(Model):
    name: ServiceName


class _Range(Model):
    min: int
    max: int

    def problems(self) -> Iterable[Problem]:
        if self.min > self.max:
            yield "min", f"expected at most max ({self.max}), got {self.min}"


class PrefillRange(_Range):
    min: int = Field(default=1, ge=0, le=1000)
    max: int = Field(ge=0, le=1000)


class DecodeRange(_Range):
    min: int = Field(default=1, ge=1, le=1000)
    max: int = Field(ge=1, le=1000)


class Budget(Model):
    gpus: int | None = Field(default=None, ge=1, le=100_000)
    watts: int | None = Field(default=None, ge=1, le=100_000_000)


class Ratio(Model):
    """Bounds on prefill workers per 100 decode workers."""

    min_prefill_percent_of_decode: int = Field(default=25, ge=0, le=10_000)
    max_prefill_percent_of_decode: int = Field(default=400, ge=1, le=10_000)

    def problems(self) -> Iterable[Problem]:
        low, high = self.min_prefill_percent_of_decode, self.max_prefill_percent_of_decode
        if low > high:
            yield "minPrefillPercentOfDecode", f"expected at most maxPrefillPercentOfDecode ({high}), got {low}"


class ScaleUp(Model):
    stabilization: Duration = Duration("0s")
    blocked_after: Duration = Field(default=Duration("15m"), description="pods Pending this long roll a decision back")


class ScaleDown(Model):
    stabilization: Duration = Duration("300s")


class Behavior(Model):
    scale_up: ScaleUp = ScaleUp()
    scale_down: ScaleDown = ScaleDown()


class PrefillFloor(Model):
    min: int = Field(ge=0, le=1000)


class DecodeFloor(Model):
    min: int = Field(ge=1, le=1000)


class Schedule(Model):
    """Raised minimums from each time `cron` fires, for `duration`."""

    cron: str = Field(pattern=CRON, max_length=128)
    duration: Duration
    prefill: PrefillFloor | None = None
    decode: DecodeFloor | None = None

    def problems(self) -> Iterable[Problem]:
        if self.prefill is None and self.decode is None:
            yield "", "expected prefill or decode with a min"
        if self.duration.seconds <= 0:
            yield "duration", "expected a duration above zero"


class ScaleToZero(Model):
    after: Duration = Duration("15m")
    max_hold: Duration = Duration("10m")


class ScalingPolicySpec(Model):
    target_ref: TargetRef
    prefill: PrefillRange
    decode: DecodeRange
    budget: Budget = Budget()
    ratio: Ratio = Ratio()
    behavior: Behavior = Behavior()
    schedules: list[Schedule] = Field(default_factory=list, max_length=32)
    scale_to_zero: ScaleToZero | None = None

    def problems(self) -> Iterable[Problem]:
        for index, schedule in enumerate(self.schedules):
            for role, limit in (("prefill", self.prefill.max), ("decode", self.decode.max)):
                floor = getattr(schedule, role)
                if floor is not None and floor.min > limit:
                    yield f"schedules.{index}.{role}.min", f"expected at most {role}.max ({limit}), got {floor.min}"
        if self.budget.gpus is not None and self.prefill.min + self.decode.min > self.budget.gpus:
            least = self.prefill.min + self.decode.min
            yield "budget.gpus", f"expected at least prefill.min + decode.min ({least}), got {self.budget.gpus}"


class ScalingPolicy(Model):
    """The one writer of both roles' counts of a service."""

    api_version: Literal["lanewise.io/v1alpha1"]
    kind: Literal["ScalingPolicy"]
    metadata: Metadata
    spec: ScalingPolicySpec
    status: dict[str, Any] | None = Field(default=None, description="written by the operator, ignored everywhere else")
