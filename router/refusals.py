"""Who is sent away at the door, and who comes back.

Owns: why an arrival is refused, and the memory of the refused, so that one who comes back is counted once.
Must not: answer anybody (the dispatcher does).
"""

from __future__ import annotations

from collections.abc import Callable

from lanewise.config import RouterConfig
from lanewise.errors import ErrorCode, LanewiseError
from lanewise.policy.admission import admit
from lanewise.policy.scaling_meter import DemandMeter
from lanewise.router.entry import Entry
from lanewise.router.held import Held
from lanewise.router.orders import Order
from lanewise.router.placement import Placement

COMES_BACK_S = 60.0  # clients wait no longer than a minute before they try again
MOST = 20_000  # remembered


class Refusals:
    """`held`: the requests that wait for a worker pair. `demand` is told of everyone who is sent away."""

    def __init__(self, config: RouterConfig, held: Held[Entry], demand: DemandMeter) -> None:
        self._max_queue_wait_s = config.max_queue_wait_s
        self._held, self._demand = held, demand
        self._until: dict[int, float] = {}  # by prompt, oldest first

    def came_back(self, order: Order, choice: int, now: float) -> bool:
        """Whether this prompt was refused lately; it no longer counts as such."""
        return bool(self._until) and self._until.pop(_who(order, choice), 0.0) > now

    def judge(
        self, entry: Entry, placement: Placement | None, is_alone: Callable[[], bool], now: float
    ) -> LanewiseError | None:
        """Why this arrival, which would be placed so, is sent away; None: it is not. `is_alone`: no other is here."""
        order, cached = entry.flight.order, 0
        if placement is None:
            error = self._held.refusal(order)
        else:
            error, cached = self._too_late(order, placement, is_alone, now), placement.cached_tokens
        if error is not None:
            self._remember(order, entry.choice, now)
            self._demand.refused(len(order.prompt_ids), cached, entry.came_back)
        return error

    def _too_late(
        self, order: Order, placement: Placement, is_alone: Callable[[], bool], now: float
    ) -> LanewiseError | None:
        predicted_s = placement.pair.predicted_ttft_s
        retry_after_s = admit(predicted_s, order.deadline_at - now, self._max_queue_wait_s)
        # One client request always gets through, with all its choices: nothing else could correct a wrong prediction.
        if retry_after_s is None or is_alone():
            return None
        message = f"predicted time to the first token is {predicted_s:.1f} s; retry later"
        return LanewiseError(ErrorCode.OVERLOADED, message, retry_after_s=retry_after_s)

    def _remember(self, order: Order, choice: int, now: float) -> None:
        while self._until and (len(self._until) >= MOST or next(iter(self._until.values())) <= now):
            del self._until[next(iter(self._until))]
        self._until[_who(order, choice)] = now + COMES_BACK_S


def _who(order: Order, choice: int) -> int:
    """The same of the same prompt of the same client: a retry has no other name."""
    return hash((order.prompt_ids, order.tenant_salt, choice))
