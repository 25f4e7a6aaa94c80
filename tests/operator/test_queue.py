"""The queue: bursts cost one look, one key is never worked on twice at once, errors back off."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from lanewise.operator import queue as module
from lanewise.operator.queue import WorkQueue

SPACING_S = 0.05


@asynccontextmanager
async def running(work: Callable[[str], Awaitable[float | None]], workers: int = 2) -> AsyncIterator[WorkQueue[str]]:
    queue: WorkQueue[str] = WorkQueue(spacing_s=SPACING_S)
    task = asyncio.create_task(queue.run(work, workers))
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def test_a_burst_is_one_look() -> None:
    seen: list[str] = []

    async def work(key: str) -> None:
        seen.append(key)

    async with running(work) as queue:
        for _ in range(50):
            queue.add("a")
        queue.add("b")
        await until(lambda: len(seen) == 2)
        for _ in range(50):
            queue.add("a")
        await until(lambda: len(seen) == 3)
    assert sorted(seen) == ["a", "a", "b"]


async def test_a_key_added_while_it_is_worked_on_is_due_again_after() -> None:
    started, release = 0, asyncio.Event()
    at_once = most = 0

    async def work(key: str) -> None:
        nonlocal started, at_once, most
        started, at_once = started + 1, at_once + 1
        most = max(most, at_once)
        await release.wait()
        at_once -= 1

    async with running(work) as queue:
        queue.add("a")
        await until(lambda: started == 1)
        queue.add("a")
        await asyncio.sleep(3 * SPACING_S)
        assert started == 1
        release.set()
        await until(lambda: started == 2)
    assert most == 1


async def test_looks_at_one_key_are_spaced_out() -> None:
    times: list[float] = []

    async def work(key: str) -> float | None:
        times.append(asyncio.get_running_loop().time())
        return 0.0 if len(times) < 4 else None

    async with running(work) as queue:
        queue.add("a")
        await until(lambda: len(times) == 4)
    assert all(b - a >= 0.9 * SPACING_S for a, b in itertools.pairwise(times))


async def test_errors_back_off_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.02)
    tries: list[float] = []
    others = 0

    async def work(key: str) -> float | None:
        nonlocal others
        if key == "good":
            others += 1
            return None
        tries.append(asyncio.get_running_loop().time())
        if len(tries) < 5:
            raise ValueError("no")
        return None

    async with running(work, workers=1) as queue:
        queue.add("bad")
        queue.add("good")
        await until(lambda: len(tries) == 5)
        assert others == 1
        await until(lambda: queue.failures("bad") == 0)
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert gaps[-1] > 1.5 * gaps[0]


async def test_what_is_forgotten_is_not_looked_at() -> None:
    seen: list[str] = []

    async def work(key: str) -> None:
        seen.append(key)

    async with running(work) as queue:
        queue.add("a", delay_s=0.05)
        queue.forget("a")
        queue.add("b", delay_s=0.1)
        await until(lambda: seen == ["b"])
    assert len(queue) == 0
