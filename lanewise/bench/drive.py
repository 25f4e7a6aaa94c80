"""Sends a workload to a target on schedule and collects every answer.

Owns: the closed loop, the open loop, the deadline on neither of them: a slow answer is an answer.
Must not: interpret answers (report.py does) or print.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from lanewise.bench.targets import Answer, Settings, Target
from lanewise.bench.workload import Ask, Prompts

SPIN_S = 0.002  # timers of an event loop are late by about this much


@dataclass(slots=True)
class Sample:
    """One request with its answer. Times are seconds since the start of the measurement."""

    ask: Ask
    scheduled_s: float
    answer: Answer

    @property
    def late_s(self) -> float:
        """How far behind its schedule this client sent it."""
        return self.answer.sent_s - self.scheduled_s


OnSample = Callable[[Sample], None]


async def closed_loop(
    target: Target, asks: Sequence[Ask], prompts: Prompts, settings: Settings, concurrency: int, on_sample: OnSample
) -> None:
    """Always `concurrency` requests under way, until all are answered."""
    waiting = iter(asks)

    async def user(waiting: Iterator[Ask]) -> None:
        for ask in waiting:
            prompt = prompts.make(ask.index, ask.prompt_tokens)
            scheduled = perf_counter()
            on_sample(Sample(ask, scheduled, await target.ask(prompt, ask.output_tokens, settings)))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(asks))):
            group.create_task(user(waiting))


async def open_loop(
    target: Target, asks: Sequence[Ask], prompts: Prompts, settings: Settings, on_sample: OnSample
) -> None:
    """Every request at its own time, however many are under way: a slow server does not slow the arrivals."""
    start = perf_counter()

    async def one(ask: Ask, prompt: list[int] | str, scheduled: float) -> None:
        on_sample(Sample(ask, scheduled, await target.ask(prompt, ask.output_tokens, settings)))

    async with asyncio.TaskGroup() as group:
        for ask in asks:
            prompt = prompts.make(ask.index, ask.prompt_tokens)  # before the wait: making it takes time
            scheduled = start + (ask.arrival_s or 0.0)
            await _sleep_until(scheduled)
            group.create_task(one(ask, prompt, scheduled))


async def _sleep_until(when: float) -> None:
    delay = when - perf_counter()
    if delay > SPIN_S:
        await asyncio.sleep(delay - SPIN_S)
    while perf_counter() < when:  # noqa: ASYNC110 (waits for time itself)
        await asyncio.sleep(0)


async def warm_up(target: Target, asks: Sequence[Ask], prompts: Prompts, settings: Settings) -> list[Answer]:
    """Requests that are not measured, one after the other."""
    return [await target.ask(prompts.make(ask.index, ask.prompt_tokens), ask.output_tokens, settings) for ask in asks]
