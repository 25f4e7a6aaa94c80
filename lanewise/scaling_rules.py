"""From a ScalingPolicy resource to the rules of policy/scaling.py, and which of its schedules are active.

Owns: units and cron. Used by the operator and the simulator alike. Must not: decide anything about scale.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cronsim import CronSim, CronSimError

from lanewise.errors import ConfigError
from lanewise.policy.scaling_types import Rules
from lanewise.spec_scaling import ScalingPolicySpec, Schedule


def rules_of(spec: ScalingPolicySpec, ttft_s: float, tpot_s: float, period_s: float) -> Rules:
    """`ttft_s` and `tpot_s`: the service's targets. `period_s`: time between two decisions."""
    ratio, behavior = spec.ratio, spec.behavior
    return Rules(
        prefill_min=spec.prefill.min,
        prefill_max=spec.prefill.max,
        decode_min=spec.decode.min,
        decode_max=spec.decode.max,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        gpus=spec.budget.gpus,
        watts=spec.budget.watts,
        min_ratio_percent=ratio.min_prefill_percent_of_decode,
        max_ratio_percent=ratio.max_prefill_percent_of_decode,
        up_stabilization_s=behavior.scale_up.stabilization.seconds,
        down_stabilization_s=behavior.scale_down.stabilization.seconds,
        blocked_after_s=behavior.scale_up.blocked_after.seconds,
        zero_after_s=spec.scale_to_zero.after.seconds if spec.scale_to_zero else None,
        period_s=period_s,
    )


def floors_at(spec: ScalingPolicySpec, at: datetime) -> tuple[int, int, str]:
    """(prefill, decode, the cron lines) of the schedules that are active at `at` (aware); the highest floor counts.

    Raises ConfigError for a line that is no cron expression.
    """
    active = [schedule for schedule in spec.schedules if is_active(schedule, at)]
    prefill = max((s.prefill.min for s in active if s.prefill is not None), default=0)
    decode = max((s.decode.min for s in active if s.decode is not None), default=0)
    return prefill, decode, ", ".join(f'"{schedule.cron}"' for schedule in active)


def is_active(schedule: Schedule, at: datetime) -> bool:
    """Whether `cron` fired within `duration` before `at`; times are UTC."""
    now = at.astimezone(UTC).replace(tzinfo=None)
    try:
        fired = next(CronSim(schedule.cron, now + timedelta(seconds=1), reverse=True), None)
    except CronSimError as error:
        raise ConfigError(f"schedules: expected five cron fields, got {schedule.cron!r}: {error}") from error
    return fired is not None and now - fired < timedelta(seconds=schedule.duration.seconds)
