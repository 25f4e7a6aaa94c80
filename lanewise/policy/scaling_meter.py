"""What clients ask of a service, as sums: the inputs of scaling, counted alike by routers and by the simulator.

Owns: what counts as a request, as late, and as work that was sent away; totals since the start.
Must not: decide, know who asks, or cost a token's way more than an addition.

A refused request is demand like any other, and late: else a service that sheds would look as if it needed no more than
it serves, and as if it served that well. One that comes back counts once: `again`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

from lanewise.policy.cost import CostModel
from lanewise.policy.scaling_types import Demand

OWN_SHARE = 0.95  # of the TTFT target that a prompt's own prefill may take to count as attainable


class DemandMeter:
    """`cost`: the cost model that some prefill worker advertises now; None while none is known."""

    def __init__(self, ttft_target_s: float, tpot_target_s: float, cost: Callable[[], CostModel | None]) -> None:
        self._ttft_s, self._tpot_s, self._cost = ttft_target_s, tpot_target_s, cost
        self._sums = {field.name: 0.0 for field in fields(Demand) if field.name != "seconds"}
        self._able: dict[str, bool] = {}  # requests under way: whether alone they would be on time

    @property
    def sums(self) -> Mapping[str, float]:
        """By the field names of `Demand`."""
        return self._sums

    def total(self) -> Demand:
        return Demand(**self._sums)

    def placed(self, request_id: str, prompt_tokens: int, cached_tokens: int, again: bool = False) -> None:
        """A request was sent to workers for the first time. `again`: it had been refused before, and counted then."""
        if request_id in self._able:
            return
        if again:
            self._sums["returned"] += 1
            self._able[request_id] = False  # it was late when it was refused
        else:
            self._able[request_id] = self._arrived(prompt_tokens, cached_tokens)

    def refused(self, prompt_tokens: int, cached_tokens: int, again: bool = False) -> None:
        """A request was sent away. `again`: not for the first time."""
        if again:
            return
        self._sums["refused"] += 1
        if self._arrived(prompt_tokens, cached_tokens):
            self._sums["attainable"] += 1
            self._sums["ttft_late"] += 1

    def _arrived(self, prompt_tokens: int, cached_tokens: int) -> bool:
        """Counts one more request; whether alone it would be on time."""
        new, sums, cost = max(prompt_tokens - cached_tokens, 1), self._sums, self._cost()
        attended = new * (cached_tokens + new / 2)
        sums["requests"] += 1
        sums["prompt_tokens"] += prompt_tokens
        sums["prompt_squares"] += prompt_tokens * prompt_tokens
        sums["uncached_tokens"] += new
        sums["uncached_squares"] += new * new
        sums["attended"] += attended
        able = cost is None or cost.alone(new, cached_tokens) <= OWN_SHARE * self._ttft_s
        if able:
            sums["able"] += 1
            sums["able_tokens"] += new
            sums["able_squares"] += new * new
            sums["able_attended"] += attended
        return able

    def token(self) -> None:
        """An output token left for a client."""
        self._sums["output_tokens"] += 1

    def ended(self, request_id: str, ttft_s: float | None, tpot_s: float | None) -> None:
        """A request has ended; one that was never placed says nothing of the workers."""
        able = self._able.pop(request_id, None)
        if able is None or ttft_s is None:
            return
        self._sums["finished"] += 1
        if able:
            self._sums["attainable"] += 1
            self._sums["ttft_late"] += ttft_s > self._ttft_s
        self._sums["tpot_late"] += tpot_s is not None and tpot_s > self._tpot_s
