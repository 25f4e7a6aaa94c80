"""Who may enter: shedding at the router, and decode admission by predicted peak KV (the Past-Future rule).

Owns: both decisions, and the estimate of remaining output they rest on.
Must not: queue, retry or preempt; the callers do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

MIN_RETRY_S = 1.0


def admit(predicted_ttft_s: float, seconds_to_deadline: float, max_queue_wait_s: float) -> float | None:
    """None: admit. Otherwise the seconds after which a retry is expected to pass: shed early rather than late."""
    excess = predicted_ttft_s - min(seconds_to_deadline, max_queue_wait_s)
    return max(excess, MIN_RETRY_S) if excess > 0 else None


def peak_tokens(running: Sequence[tuple[int, int]]) -> int:
    """Peak KV of sequences given as (held, remaining): max over k of Σ_{i≤k} held_i + k·remaining_k.

    Sorted by what remains, descending: when the k-th longest ends, the k longer ones still hold what they had and grew
    by its remaining length.
    """
    peak = held = 0
    for count, (now, remaining) in enumerate(sorted(running, key=lambda item: -item[1]), start=1):
        held += now
        peak = max(peak, held + count * remaining)
    return peak


class OutputLengths:
    """Recent output lengths, asked for the remaining length of a sequence given what it has generated."""

    def __init__(self, window: int = 200, quantile: float = 0.9, initial: int = 256) -> None:
        self._recent: deque[int] = deque(maxlen=window)
        self._sorted: list[int] = []
        self._quantile = quantile
        self._initial = initial

    def observe(self, tokens: int) -> None:
        """A sequence ended with this many output tokens."""
        self._recent.append(tokens)
        self._sorted = sorted(self._recent)

    def remaining(self, generated: int, limit: int) -> int:
        """Predicted further tokens: a high quantile of the recent outputs longer than `generated`, at most `limit`.

        A sequence that outlived all recent ones is expected to grow by a tenth more: optimistic enough to admit, and
        preemption corrects the rest.
        """
        left = max(limit - generated, 0)
        if not self._recent:
            return min(self._initial, left)
        first = bisect_right(self._sorted, generated)
        longer = len(self._sorted) - first
        if not longer:
            return min(max(generated // 10, 1), left)
        index = first + min(int(longer * self._quantile), longer - 1)
        return min(self._sorted[index] - generated, left)
