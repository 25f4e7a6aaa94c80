"""Lanes over instances: which prefill instances prefer short and which long prompts, and when one moves.

Owns: the boundary between short and long, the pressure of a lane, the move decision (ours and the published one).
Must not: move anything. The worker owns its lane; a move is a compare-and-set on its `lane_generation`.

Dedicated lanes are off by default: a shared pool that preempts at chunk borders beat them in every measurement
(docs/scheduling.md). They are for fleets whose instances differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from lanewise.fleet import Lane, WorkerView
from lanewise.policy.baseline_routing import worker_cost
from lanewise.policy.routing import predicted_ttft

PERIOD_S = 5.0
COOLDOWN_S = 10.0  # an instance that moved stays; with PERIOD_S this follows a change of mix within 30 s
HYSTERESIS = 0.5  # one lane must be this much worse off than the other
HOT = 0.5  # of the target: below this predicted P90 nobody is in need
MINIMUM = 1  # instances a lane keeps
DEFAULT_BOUNDARY = 256  # tokens, before anything is learned


@dataclass(frozen=True, slots=True)
class LaneMove:
    incarnation: str
    to: Lane
    generation: int  # the one the proposal is based on
    reason: str


def pressure(views: Sequence[WorkerView], tokens: int, target_s: float) -> float:
    """Predicted P90 TTFT over target of prompts of this length in a lane, beyond what they take alone.

    What a prompt takes alone is no fault of the lane: counted, it would draw instances to the long lane for ever.
    """
    if not views:
        return float("inf")
    costs = [(view, worker_cost(view)) for view in views]
    length = max(tokens, 1)
    times = sorted(predicted_ttft(v, length, 0, cost, target_s) - cost.alone(length) for v, cost in costs)
    return times[ceil(0.9 * len(times)) - 1] / target_s


def propose_move(
    prefill: Sequence[WorkerView],
    p90_tokens: Mapping[Lane, int],
    target_s: float,
    shares: Mapping[Lane, float] | None = None,
) -> LaneMove | None:
    """At most one move: from the lane at ease to the lane in need, never below the minimum, never inside the cool-down.

    The cool-down counts for every instance of either lane, so that each move is judged before the next. `shares` of
    the recent work: a lane keeps as many instances as its share needs. Its pressure alone says too little: it stays
    low until the last instance that could be spared is gone, and then one is drawn back, for ever.
    """
    lanes = {lane: [view for view in prefill if view.stats.lane is lane] for lane in (Lane.SHORT, Lane.LONG)}
    if not all(lanes.values()) or any(v.stats.lane_age_s < COOLDOWN_S for views in lanes.values() for v in views):
        return None
    load = {lane: pressure(views, p90_tokens.get(lane, 0), target_s) for lane, views in lanes.items()}
    hot, cold = sorted(load, key=lambda lane: -load[lane])
    if load[hot] < HOT or load[hot] <= (1 + HYSTERESIS) * load[cold] or len(lanes[cold]) <= MINIMUM:
        return None
    if shares is not None and len(lanes[cold]) - 1 < shares.get(cold, 0.0) * sum(map(len, lanes.values())) - 0.5:
        return None
    movable = [view for view in lanes[cold] if view.ready and not view.stats.draining]
    if not movable:
        return None
    moved = min(movable, key=lambda v: (v.stats.queued_tokens + v.inflight_tokens, v.identity.incarnation))
    reason = f"predicted P90 TTFT / target: {hot.value} {load[hot]:.2f}, {cold.value} {load[cold]:.2f}"
    return LaneMove(moved.identity.incarnation, hot, moved.stats.lane_generation, reason)


def first_lane(prefill: Sequence[WorkerView]) -> LaneMove | None:
    """A lane for an instance that has none: the lane with fewer instances. None: all have one, or there is only one."""
    undecided = [view for view in prefill if view.stats.lane is Lane.ANY and view.ready]
    if len(prefill) < 2 or not undecided:
        return None
    count = {lane: sum(view.stats.lane is lane for view in prefill) for lane in (Lane.SHORT, Lane.LONG)}
    lane = Lane.SHORT if count[Lane.SHORT] <= count[Lane.LONG] else Lane.LONG
    new = min(undecided, key=lambda view: view.identity.incarnation)
    return LaneMove(new.identity.incarnation, lane, new.stats.lane_generation, "it had no lane")


def published_move(prefill: Sequence[WorkerView]) -> LaneMove | None:
    """The LAPS artifact: with more than twice the pending requests per pool of the other, it gets an instance."""
    lanes = {lane: [view for view in prefill if view.stats.lane is lane] for lane in (Lane.SHORT, Lane.LONG)}
    pending = {
        lane: sum(view.stats.queued_requests + view.inflight_requests for view in views)
        for lane, views in lanes.items()
    }
    hot, cold = sorted(pending, key=lambda lane: -pending[lane])
    if pending[hot] <= 2 * max(pending[cold], 1) or len(lanes[cold]) <= MINIMUM:
        return None
    moved = lanes[cold][0]
    return LaneMove(moved.identity.incarnation, hot, moved.stats.lane_generation, f"{pending[hot]} : {pending[cold]}")


class LaneController:
    """The state between two proposals: recent lengths, for the boundary and the P90 of each lane.

    The learned boundary is the uncached length up to which prompts make `short_share` of the work: with as many
    instances per lane as shares of work, both lanes are loaded alike. A fixed boundary counts whole prompts.
    """

    def __init__(
        self,
        target_s: float,
        fixed_tokens: int | None = None,
        move: Callable[[LaneController, Sequence[WorkerView]], LaneMove | None] | None = None,
    ) -> None:
        self._target_s = target_s
        self._fixed = fixed_tokens
        self._move = move
        self._recent: deque[int] = deque(maxlen=1000)
        self.boundary = fixed_tokens or DEFAULT_BOUNDARY
        self.moves = 0

    @staticmethod
    def start(instances: int) -> list[Lane]:
        """Halves; with one instance there are no lanes."""
        if instances < 2:
            return [Lane.ANY] * instances
        return [Lane.SHORT] * (instances // 2) + [Lane.LONG] * (instances - instances // 2)

    def lane_of(self, uncached_tokens: int, prompt_tokens: int) -> Lane:
        """The lane of a request that arrives now."""
        length = prompt_tokens if self._fixed else uncached_tokens
        self._recent.append(length)
        return Lane.SHORT if length <= self.boundary else Lane.LONG

    def propose(self, prefill: Sequence[WorkerView]) -> LaneMove | None:
        """Every `PERIOD_S`."""
        if not self._recent:
            return None
        ordered = sorted(self._recent)
        if self._fixed is None:
            self.boundary = self._learn(ordered)
        if self._move is not None:
            move = self._move(self, prefill)
        else:
            short = [length for length in ordered if length <= self.boundary] or ordered[:1]
            long = [length for length in ordered if length > self.boundary] or ordered[-1:]
            p90 = {Lane.SHORT: short[int(0.9 * (len(short) - 1))], Lane.LONG: long[int(0.9 * (len(long) - 1))]}
            share = sum(length for length in ordered if length <= self.boundary) / sum(ordered)
            move = propose_move(prefill, p90, self._target_s, {Lane.SHORT: share, Lane.LONG: 1 - share})
        self.moves += move is not None
        return move

    @staticmethod
    def _learn(ordered: Sequence[int], short_share: float = 0.4) -> int:
        total, seen = sum(ordered), 0
        for length in ordered:
            seen += length
            if seen > short_share * total:
                return max(length - 1, 1)
        return ordered[-1]


LANE_CONTROLLERS: dict[str, Callable[[float], LaneController]] = {
    "learned": lambda target_s: LaneController(target_s),
    "fixed": lambda target_s: LaneController(target_s, DEFAULT_BOUNDARY),
    "laps-pools": lambda target_s: LaneController(
        target_s, DEFAULT_BOUNDARY, lambda _, prefill: published_move(prefill)
    ),
}
