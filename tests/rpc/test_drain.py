"""The stages of a worker's drain, against a backend that falls idle when the test says so."""

from __future__ import annotations

import asyncio

import pytest

from lanewise.rpc import drain
from lanewise.rpc.drain import Drain


class Worker:
    """Backend, sessions and health of one worker; remembers what it was told."""

    def __init__(self) -> None:
        self.idle = False
        self.num_sessions = 1
        self.told: list[str] = []
        self.made = Drain(self, self, self.unready)

    async def unready(self) -> None:
        self.told.append("unready")

    def drain(self) -> None:
        self.told.append("drain")

    def give_back(self) -> None:
        self.told.append("give back")
        self.idle = True

    def tell_draining(self) -> None:
        self.told.append("tell draining")

    def tell_handover(self) -> None:
        self.told.append("tell handover")


FINISHED = ["unready", "drain", "tell draining"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "POLL_S", 0.001)
    monkeypatch.setattr(drain, "LINGER_S", 0.05)


async def ended(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(5):
        await task


async def test_one_that_falls_idle_in_time_hands_nothing_over() -> None:
    worker = Worker()
    task = worker.made.begin(timeout_s=5, max_s=5)
    await asyncio.sleep(0.02)
    assert not task.done()
    worker.idle = True
    await ended(task)
    assert worker.told == FINISHED


async def test_handover_then_in_place_then_given_back() -> None:
    worker = Worker()
    await ended(worker.made.begin(timeout_s=0.05, max_s=0.15))
    assert worker.told == [*FINISHED, "tell handover", "give back"]


async def test_a_handover_that_works_gives_nothing_back() -> None:
    worker = Worker()
    task = worker.made.begin(timeout_s=0.02, max_s=5)
    while "tell handover" not in worker.told:
        await asyncio.sleep(0.001)
    worker.idle = True
    await ended(task)
    assert worker.told == [*FINISHED, "tell handover"]


async def test_work_that_was_on_its_way_is_waited_for() -> None:
    """It falls idle, and within the time that a router needs to hear of the drain something more arrives."""
    worker = Worker()
    worker.idle = True
    task = worker.made.begin(timeout_s=5, max_s=5)
    await asyncio.sleep(0.02)
    worker.idle = False
    await asyncio.sleep(0.1)
    assert not task.done()
    worker.idle = True
    await ended(task)


async def test_nobody_is_waited_for_without_routers() -> None:
    worker = Worker()
    worker.idle, worker.num_sessions = True, 0
    started = asyncio.get_running_loop().time()
    await ended(worker.made.begin(timeout_s=5, max_s=5))
    assert asyncio.get_running_loop().time() - started < 0.04


async def test_a_second_signal_hurries_and_a_second_begin_changes_nothing() -> None:
    worker = Worker()
    task = worker.made.begin(timeout_s=60, max_s=60)
    assert worker.made.begin(timeout_s=0, max_s=0) is task
    await asyncio.sleep(0.02)
    assert not task.done()
    worker.made.hurry()
    await ended(task)
    assert worker.told[-1] == "give back"
