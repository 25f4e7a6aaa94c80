"""What steps take, measured while two of them overlap with the host: on a scripted device, in virtual time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest

from lanewise.decode_worker.ahead import Steps, runs_ahead
from lanewise.engine.runner import Work
from lanewise.engine.sequence import Sequence
from lanewise.policy.baselines import Fcfs
from lanewise.policy.batching import BatchPlan, Job
from lanewise.policy.cost import CostModel
from lanewise.request import Sampling

STEP_S = 0.010


class Device:
    """Computes one launch after the other, `STEP_S` each, and keeps the host or not while it does."""

    def __init__(self, waits: bool) -> None:
        self.now, self.free_at, self.waits = 0.0, 0.0, waits

    def launch(self, work: list[Work], on_layers: None = None, after: Any = None) -> Launched:
        self.free_at = max(self.now, self.free_at) + STEP_S
        if self.waits:
            self.now = self.free_at
        return Launched(self, self.free_at, len(work))


class Launched:
    def __init__(self, device: Device, over_at: float, count: int) -> None:
        self._device, self._over_at, self._count = device, over_at, count

    @property
    def done(self) -> bool:
        return self._device.now >= self._over_at

    def result(self) -> list[None]:
        self._device.now = max(self._device.now, self._over_at)
        return [None] * self._count


class Recorded(Fcfs):
    def __init__(self) -> None:
        super().__init__(max_batch_tokens=64, cost=CostModel())
        self.observed: list[tuple[float, float]] = []

    def observe(self, plan: BatchPlan, now: float, duration_s: float) -> None:
        self.observed.append((now, duration_s))


def work(name: str = "a", new: int = 1) -> Work:
    return Work(Sequence((name, 1), list(range(100)), 100, Sampling(9), num_computed=100 - new), new)


def measure(*, waits: bool, ahead: bool, host_s: float, steps: int = 20) -> list[float]:
    device, policy = Device(waits), Recorded()
    made = Steps(device, policy, lambda: device.now, ahead=ahead)  # type: ignore[arg-type]
    taken = []
    for _ in range(steps):
        device.now += host_s
        made.launch([work()], BatchPlan(), [], lambda: None)
        while len(made) > made.most_out:
            made.take()
            taken.append(made.meter.took_s)
    assert made.decode_step_s == pytest.approx(sum(taken[1:]) / len(taken[1:]), rel=0.2)
    return taken


def test_a_step_takes_what_it_takes_alone():
    """On a device that keeps the host there is nothing to overlap; on another the host's time is hidden, not added."""
    host_s = 0.003
    for ahead in (False, True):
        assert measure(waits=True, ahead=ahead, host_s=host_s) == pytest.approx([STEP_S] * (20 - ahead))
    assert measure(waits=False, ahead=False, host_s=host_s) == pytest.approx([STEP_S] * 20)
    assert measure(waits=False, ahead=True, host_s=host_s) == pytest.approx([STEP_S] * 19)


def test_where_the_host_is_slower_the_step_is_as_long_as_its_round():
    taken = measure(waits=False, ahead=True, host_s=0.025)
    assert taken[1:] == pytest.approx([0.025] * 18)


def test_a_batch_of_prompts_ends_for_the_policy_when_none_follows():
    """Requests that come while one runs were kept waiting by it, though the one before has just ended."""
    device, policy = Device(waits=False), Recorded()
    made = Steps(device, policy, lambda: device.now, ahead=True)  # type: ignore[arg-type]
    key: Hashable = ("p", 1)
    policy.add(Job(key, 0.0, 30))
    waiting = []
    for new in (10, 20):
        plan = BatchPlan(((key, new),))
        made.launch([], plan, [work("p", new)], lambda: waiting.append(made.meter.wait_s(device.now)))
    assert key not in policy.jobs, "chunks that are launched wait no longer"
    made.take()
    assert policy.observed == []
    assert made.meter.wait_s(device.now) > 0, "the second runs"
    made.take()
    assert policy.observed == [(pytest.approx(2 * STEP_S), pytest.approx(STEP_S))]
    assert made.meter.wait_s(device.now) == 0
    assert waiting[0] > 0


def test_when_it_is_used():
    assert [runs_ahead("auto", device) for device in ("cpu", "cuda:0")] == [False, True]
    assert [runs_ahead("always", "cpu"), runs_ahead("never", "cuda:0")] == [True, False]
