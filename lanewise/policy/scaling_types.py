"""What a scaling decision depends on, and what it is: demand, roles, rules, state, decision.

Owns: the records of `scaling.py`, all immutable. Must not: decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from lanewise.policy.cost import CostModel


@dataclass(frozen=True, slots=True)
class Demand:
    """What reached all routers together in `seconds`, or (as totals of one router) since it started.

    Sums of squares carry the spread: a few long prompts need more room than many short ones of the same sum.
    """

    seconds: float = 0.0
    requests: float = 0.0
    prompt_tokens: float = 0.0
    prompt_squares: float = 0.0
    uncached_tokens: float = 0.0
    uncached_squares: float = 0.0
    attended: float = 0.0  # Σ n·(c + n/2): pairs of new token and token attended to
    output_tokens: float = 0.0  # sent to clients
    finished: float = 0.0
    attainable: float = 0.0  # of the finished and the refused: whose own prefill alone fits the TTFT target
    ttft_late: float = 0.0  # of the attainable
    tpot_late: float = 0.0  # of the finished
    able: float = 0.0  # of the requests: whose own prefill alone fits the TTFT target; then their sums
    able_tokens: float = 0.0
    able_squares: float = 0.0
    able_attended: float = 0.0
    refused: float = 0.0  # of the requests: sent away, so that none of their tokens was made
    returned: float = 0.0  # of the refused: came back and were taken; their tokens count as they are made

    def __add__(self, other: Demand) -> Demand:
        return Demand(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def since(self, before: Demand, seconds: float) -> Demand:
        """The difference of two totals; a router that restarted counts from zero."""
        lost = self.requests < before.requests
        values = {f.name: getattr(self, f.name) - (0.0 if lost else getattr(before, f.name)) for f in fields(self)}
        return Demand(**{name: max(value, 0.0) for name, value in values.items()} | {"seconds": seconds})


@dataclass(frozen=True, slots=True)
class RoleView:
    """One role's Deployment and pods."""

    desired: int  # replicas asked for
    ready: int
    pending: int = 0  # pods the scheduler has found no node for
    pending_s: float = 0.0  # the oldest of them
    terminating: int = 0  # pods on their way out; they still hold their GPUs
    cost: CostModel = field(default_factory=CostModel)
    kv_capacity_tokens: int = 0  # of one worker; 0: unknown
    gpus: int = 1  # of one worker
    watts: float = 0.0  # of one worker; 0: unknown
    correction: float = 1.0  # measured over expected time of a step or batch, where workers report both


@dataclass(frozen=True, slots=True)
class Observation:
    """The service at one instant. `demand.seconds == 0`: no router answered, nothing is known."""

    at_s: float
    demand: Demand
    prefill: RoleView
    decode: RoleView
    queued_tokens: float = 0.0  # uncached tokens that wait at prefill workers
    running: float = 0.0  # sequences decoding or waiting to
    held: int = 0  # requests that wait at routers for a worker
    prefill_floor: int = 0  # raised minimums of schedules that are active now
    decode_floor: int = 0
    floor_reason: str = ""
    start_s: float = 60.0  # from asking for a pod to its first request, as measured


@dataclass(frozen=True, slots=True)
class Rules:
    """A ScalingPolicy and the service's targets, in base units."""

    prefill_min: int
    prefill_max: int
    decode_min: int
    decode_max: int
    ttft_s: float
    tpot_s: float
    gpus: int | None = None
    watts: float | None = None
    min_ratio_percent: int = 25  # prefill workers per 100 decode workers
    max_ratio_percent: int = 400
    up_stabilization_s: float = 0.0
    down_stabilization_s: float = 300.0
    up_per_minute: float = 1.0  # share of the present count that may be added in a minute, at least 4 workers
    down_per_minute: float = 0.5  # share that may be removed, at least 1 worker
    blocked_after_s: float = 900.0
    zero_after_s: float | None = None  # None: never to zero
    late_share: float = 0.03  # of the attainable requests may miss their TTFT target
    period_s: float = 15.0  # between two decisions
    backoff_s: float = 300.0  # before the first retry of a blocked decision; doubles, at most an hour


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A role that could not grow further: the count that was scheduled, until when it holds, and how often by now."""

    count: int
    until_s: float
    failures: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Both roles at one instant: a decision, a wish, or what was there."""

    at_s: float
    prefill: int
    decode: int


@dataclass(frozen=True, slots=True)
class Season:
    """Mean request rate by time of day (UTC), in equal bins; a bin that was never seen is negative."""

    rates: tuple[float, ...]
    bin_sum: float = 0.0  # of the bin under way
    bin_seconds: float = 0.0
    bin: int = -1
    covered_s: float = 0.0  # of time observed so far


@dataclass(frozen=True, slots=True)
class Tried:
    """A role's last step down, and how often such a step had to be taken back under that load."""

    at_s: float
    count: int  # to which
    load: float  # of the role, in whatever it is measured
    failures: int = 0
    until_s: float = 0.0  # not to that count again before


@dataclass(frozen=True, slots=True)
class State:
    """All memory between decisions. A fresh one is safe: nothing shrinks until a stabilisation window has passed."""

    since_s: float | None = None
    bins: tuple[Demand, ...] = ()  # newest last
    season: Season | None = None
    wishes: tuple[Counts, ...] = ()  # what was needed, within the stabilisation windows
    made: tuple[Counts, ...] = ()  # counts of the last minute, for the rate limits
    late_seen: float = 0.0  # decaying sums, for the correction of expected late shares
    late_expected: float = 0.0
    slow_seen: float = 0.0  # the same of TPOT
    slow_expected: float = 0.0
    calm_late: float = 0.0  # late TPOTs, and ends, while hardly a moment should have been crowded
    calm_finished: float = 0.0
    idle_since_s: float | None = None
    prefill_tried: Tried | None = None
    decode_tried: Tried | None = None
    prefill_ceiling: Ceiling | None = None
    decode_ceiling: Ceiling | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The counts to ask for, why, and the memory for the next decision."""

    prefill: int
    decode: int
    reason: str  # inputs -> requirement -> decision, for people
    state: State
    limited: str = ""  # which rule kept the decision from the requirement
    blocked: str = ""  # which role's pods cannot be scheduled
    wanted: Counts | None = None  # the requirement itself
    facts: dict[str, float] = field(default_factory=dict)  # the numbers behind the words
