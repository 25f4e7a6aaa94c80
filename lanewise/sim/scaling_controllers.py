"""Who sets the counts in a simulated day: the policy itself, what others ship, and schedules that know the future.

Owns: one object per rule with one method, `counts`. Must not: serve requests or keep time.
The rules of others are written from their documentation and get what each of them can measure, freshly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from lanewise.policy.scaling import decide
from lanewise.policy.scaling_types import Observation, Rules, State

SYNC_S = 15.0  # of the HPA controller
HPA_TOLERANCE = 0.1
HPA_UP = 4  # pods, or as many as there are, in one sync


@dataclass(frozen=True, slots=True)
class Measured:
    """What a rule may look at beside the observation of the policy."""

    at_s: float
    prefill: int  # desired
    decode: int
    prefill_ready: int
    decode_ready: int
    prefill_busy: float  # share of time, over the last period
    prefill_waiting: float  # requests
    prefill_outstanding: float  # waiting and being computed
    decode_running: float
    decode_kv: float  # share of the pools in use


class Controller(Protocol):
    """`reason` explains the last answer where there is something to say."""

    reason: str

    def counts(self, measured: Measured, seen: Callable[[], Observation]) -> tuple[int, int]:
        """The counts to ask for. Called every SYNC_S."""
        ...


class Policy:
    """`lanewise.policy.scaling`, as the operator runs it."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.state, self.reason = rules, State(), ""

    def counts(self, measured: Measured, seen: Callable[[], Observation]) -> tuple[int, int]:
        decision = decide(self.rules, self.state, seen())
        self.state, self.reason = decision.state, decision.reason
        return decision.prefill, decision.decode


class Schedule:
    """(from second, prefill, decode), ascending; asks early enough that pods are up in time. One entry: static."""

    def __init__(self, steps: Sequence[tuple[float, int, int]], start_s: float) -> None:
        self._steps, self._start_s, self.reason = list(steps), start_s, "schedule"
        self._times = [step[0] for step in steps]

    def counts(self, measured: Measured, seen: Callable[[], Observation]) -> tuple[int, int]:
        """What is needed now, or when a pod asked for now would serve."""
        first = max(bisect_right(self._times, measured.at_s) - 1, 0)
        last = bisect_right(self._times, measured.at_s + self._start_s + SYNC_S)
        steps = self._steps[first : max(last, first + 1)]
        return max(step[1] for step in steps), max(step[2] for step in steps)


class _Role:
    """The HPA's algorithm for one role: ratio, tolerance, 300 s of downscale stabilisation, bounded growth."""

    def __init__(self, most: int, stabilization_s: float = 300.0) -> None:
        self._most = most
        self._window: deque[tuple[float, int]] = deque()
        self._stabilization_s = stabilization_s

    def to(self, now: float, here: int, wanted: int) -> int:
        wanted = min(max(wanted, 1), self._most)
        self._window.append((now, wanted))
        while self._window[0][0] < now - self._stabilization_s:
            self._window.popleft()
        if wanted >= here:
            return min(wanted, here + max(HPA_UP, here))
        return min(max(count for _, count in self._window), here)

    def by_ratio(self, now: float, here: int, ready: int, ratio: float) -> int:
        return self.to(now, here, here if abs(ratio - 1) <= HPA_TOLERANCE else ceil(ratio * max(ready, 1) - 1e-9))


class HpaUtilisation:
    """Prefill by its busy share, decode by the share of its KV in use (busy time says nothing of decoding)."""

    def __init__(self, prefill_target: float, decode_target: float, most: tuple[int, int]) -> None:
        self._targets, self.reason = (prefill_target, decode_target), ""
        self._prefill, self._decode = _Role(most[0]), _Role(most[1])
        self._recent: deque[tuple[float, float]] = deque(maxlen=2)  # a metrics window of 30 s

    def counts(self, measured: Measured, seen: Callable[[], Observation]) -> tuple[int, int]:
        self._recent.append((measured.prefill_busy, measured.decode_kv))
        busy, kv = (sum(values) / len(self._recent) for values in zip(*self._recent, strict=True))
        now, p, d = measured.at_s, measured.prefill, measured.decode
        return (
            self._prefill.by_ratio(now, p, measured.prefill_ready, busy / self._targets[0]),
            self._decode.by_ratio(now, d, measured.decode_ready, kv / self._targets[1]),
        )


class KedaQueue:
    """Outstanding requests per prefill worker and sequences per decode worker, as an AverageValue of KEDA."""

    def __init__(self, prefill_target: float, decode_target: float, most: tuple[int, int]) -> None:
        self._targets, self.reason = (prefill_target, decode_target), ""
        self._prefill, self._decode = _Role(most[0]), _Role(most[1])

    def counts(self, measured: Measured, seen: Callable[[], Observation]) -> tuple[int, int]:
        now = measured.at_s
        wanted = (
            (self._prefill, measured.prefill, measured.prefill_outstanding / self._targets[0]),
            (self._decode, measured.decode, measured.decode_running / self._targets[1]),
        )
        found = [
            role.to(now, here, here if abs(count / here - 1) <= HPA_TOLERANCE else ceil(count - 1e-9))
            for role, here, count in wanted
        ]
        return found[0], found[1]


class Threshold:
    """One more prefill worker when more than `queue` requests wait per worker, one more decode worker above `kv`;
    one fewer when one fewer would have stayed under `spare` of that for 300 s. One step per start-up time."""

    def __init__(self, kv: float, queue: float, spare: float, most: tuple[int, int], start_s: float) -> None:
        self._kv, self._queue, self._spare, self.reason = kv, queue, spare, ""
        self._most, self._start_s = most, start_s
        self._quiet: list[float | None] = [None, None]
        self._moved = [float("-inf"), float("-inf")]

    def counts(self, measured: Measured, seen: Callable[[], Observation]) -> tuple[int, int]:
        waiting = measured.prefill_waiting
        return (
            self._step(0, measured.at_s, measured.prefill, measured.prefill_ready, waiting / self._queue),
            self._step(
                1,
                measured.at_s,
                measured.decode,
                measured.decode_ready,
                measured.decode_kv * measured.decode / self._kv,
            ),
        )

    def _step(self, role: int, now: float, here: int, ready: int, load: float) -> int:
        """`load`: in workers' worth of the threshold."""
        if now - self._moved[role] < self._start_s:
            return here
        if load > max(ready, 1) and here < self._most[role]:
            self._moved[role], self._quiet[role] = now, None
            return here + 1
        if here < 2 or load > self._spare * (here - 1):
            self._quiet[role] = None
            return here
        since = self._quiet[role]
        if since is None:
            self._quiet[role] = now
        elif now - since >= 300.0:
            self._moved[role], self._quiet[role] = now, None
            return here - 1
        return here
