"""Both roles' counts in one allocation: minimums, maximums, ratio, GPU and power budget, pods on their way counted.

Owns: which pairs of counts are allowed, and the best of them for a requirement.
Must not: know demand or time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a pair of counts must keep. `gpus` and `watts` are those of one worker; a budget of None is no limit.

    `present` and `terminating` are counted by the budgets too: a worker that shrinks one role to grow the other holds
    both until its pods are gone.
    """

    prefill: tuple[int, int]  # least, most
    decode: tuple[int, int]
    ratio_percent: tuple[int, int] = (0, 1_000_000)
    gpu_budget: float | None = None
    watt_budget: float | None = None
    prefill_gpus: int = 1
    decode_gpus: int = 1
    prefill_watts: float = 0.0
    decode_watts: float = 0.0
    present: tuple[int, int] = (0, 0)
    terminating: tuple[int, int] = (0, 0)

    def within_ratio(self, prefill: int, decode: int) -> bool:
        low, high = self.ratio_percent
        return low * decode <= 100 * prefill <= high * decode

    def held(self, prefill: int, decode: int) -> tuple[float, float]:
        """GPUs and watts at the worst moment of going from `present` to these counts."""
        p = max(prefill, self.present[0]) + self.terminating[0]
        d = max(decode, self.present[1]) + self.terminating[1]
        return p * self.prefill_gpus + d * self.decode_gpus, p * self.prefill_watts + d * self.decode_watts

    def within_budget(self, prefill: int, decode: int) -> bool:
        """True where nothing grows, too: giving up workers is always allowed."""
        if prefill <= self.present[0] and decode <= self.present[1] and self.present != (0, 0):
            return self._within(*self._static(prefill, decode))
        return self._within(*self.held(prefill, decode))

    def _static(self, prefill: int, decode: int) -> tuple[float, float]:
        gpus = prefill * self.prefill_gpus + decode * self.decode_gpus
        return gpus, prefill * self.prefill_watts + decode * self.decode_watts

    def _within(self, gpus: float, watts: float) -> bool:
        return (self.gpu_budget is None or gpus <= self.gpu_budget + 1e-9) and (
            self.watt_budget is None or watts <= self.watt_budget + 1e-6
        )

    def allows(self, prefill: int, decode: int) -> bool:
        return (
            self.prefill[0] <= prefill <= self.prefill[1]
            and self.decode[0] <= decode <= self.decode[1]
            and self.within_ratio(prefill, decode)
            and self.within_budget(prefill, decode)
        )


def allocate(bounds: Bounds, prefill: int, decode: int) -> tuple[int, int] | None:
    """The allowed pair that serves the requirement best; None where no pair is allowed at all.

    Best: the worse-served role is served most, then both together, then the fewest GPUs. Where everything fits that is
    the requirement itself, or the least pair above it that keeps the ratio.
    """
    best: tuple[tuple[float, float, int, int], tuple[int, int]] | None = None
    for p, d in _candidates(bounds, prefill):
        share_p = min(p / prefill, 1.0) if prefill > 0 else 1.0
        share_d = min(d / decode, 1.0) if decode > 0 else 1.0
        gpus = p * bounds.prefill_gpus + d * bounds.decode_gpus
        rank = (min(share_p, share_d), share_p + share_d, -gpus, d)
        if best is None or rank > best[0]:
            best = (rank, (p, d))
    return None if best is None else best[1]


def _candidates(bounds: Bounds, prefill: int) -> Iterator[tuple[int, int]]:
    """For each decode count the allowed prefill count nearest to the requirement."""
    low_ratio, high_ratio = bounds.ratio_percent
    for d in range(bounds.decode[0], bounds.decode[1] + 1):
        low = max(bounds.prefill[0], -(-low_ratio * d // 100))
        high = min(bounds.prefill[1], high_ratio * d // 100, _most_prefill(bounds, d))
        if low > high:
            continue
        p = min(max(prefill, low), high)
        if bounds.allows(p, d):
            yield p, d


def _most_prefill(bounds: Bounds, decode: int) -> int:
    """Largest prefill count within the budgets beside `decode` decode workers (-1: none)."""
    most = bounds.prefill[1]
    shrinks = decode <= bounds.present[1]
    for budget, one_p, one_d in (
        (bounds.gpu_budget, float(bounds.prefill_gpus), float(bounds.decode_gpus)),
        (bounds.watt_budget, bounds.prefill_watts, bounds.decode_watts),
    ):
        if budget is None or one_p <= 0:
            continue
        d = max(decode, bounds.present[1]) + bounds.terminating[1]
        room = floor((budget - d * one_d) / one_p + 1e-9) - bounds.terminating[0]
        if room < bounds.present[0] and shrinks:  # nothing grows: only what stays is counted
            room = min(floor((budget - decode * one_d) / one_p + 1e-9), bounds.present[0])
        elif room < bounds.present[0]:
            room = -1  # growing decode is not possible while prefill holds what it has
        most = min(most, room)
    return most
