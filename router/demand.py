"""What clients ask of this service, as sums: the inputs of scaling.

Owns: totals since the router started, for `Fleet/Snapshot`.
Must not: decide, or cost a token's way more than an addition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from lanewise.policy.cost import CostModel
from lanewise.policy.scaling_types import Demand
from lanewise.rpc import lanewise_pb2 as pb

OWN_SHARE = 0.95  # of the TTFT target that a prompt's own prefill may take to count as attainable


class DemandMeter:
    """`cost`: the cost model that some prefill worker advertises now; None while none is known."""

    def __init__(self, ttft_target_s: float, tpot_target_s: float, cost: Callable[[], CostModel | None]) -> None:
        self._ttft_s, self._tpot_s, self._cost = ttft_target_s, tpot_target_s, cost
        self._sums = {field.name: 0.0 for field in fields(Demand) if field.name != "seconds"}
        self._able: dict[str, bool] = {}  # requests under way: whether alone they would be on time

    def placed(self, request_id: str, prompt_tokens: int, cached_tokens: int) -> None:
        """A request was sent to workers for the first time."""
        if request_id in self._able:
            return
        new, sums, cost = max(prompt_tokens - cached_tokens, 1), self._sums, self._cost()
        attended = new * (cached_tokens + new / 2)
        sums["requests"] += 1
        sums["prompt_tokens"] += prompt_tokens
        sums["prompt_squares"] += prompt_tokens * prompt_tokens
        sums["uncached_tokens"] += new
        sums["uncached_squares"] += new * new
        sums["attended"] += attended
        able = cost is None or cost.alone(new, cached_tokens) <= OWN_SHARE * self._ttft_s
        self._able[request_id] = able
        if able:
            sums["able"] += 1
            sums["able_tokens"] += new
            sums["able_squares"] += new * new
            sums["able_attended"] += attended

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

    def to_wire(self) -> pb.Demand:
        return pb.Demand(**self._sums)
