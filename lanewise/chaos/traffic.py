"""The load of a campaign: requests whose answers are known, and when each of their tokens came.

Owns: the prompts, what an undisturbed service answers to them, and the outcome of every request.
Must not: know faults.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise

from lanewise.client import Accepted, AsyncClient, Delta, Finished
from lanewise.errors import LanewiseError

LENGTHS = (40, 100, 190, 330, 520)
"""Tokens of a prompt. Few lengths, so that a request often has a double that `misbind` can take for it."""
FAMILIES, SHARED_TOKENS = 6, 128
OUTPUT_TOKENS = (2, 8, 24, 48)
TOKEN_IDS = (100, 4000)
HANG_S = 45.0
"""A request that has not ended by then hangs: beyond every deadline of the protocol and of the router's holding."""
CANCEL_SHARE = 0.05
SLOW_S = 2.0
"""A request that waits longer for any of its tokens is asked about."""


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    max_tokens: int


@dataclass(slots=True)
class Trip:
    """One request, by the clock of the faults (monotonic seconds)."""

    number: int
    started: float
    token_at: list[float] = field(default_factory=list)
    ended: float = 0.0
    outcome: str = ""  # ok, wrong, hung, cancelled, or the code of the error
    detail: str = ""
    request_id: str = ""  # the router's
    story: list[str] = field(default_factory=list)  # of a slow one: what the router did with it

    def next_after(self, at: float, first: int = 0) -> float:
        """When the first token after `at` came, not counting the `first` ones of the answer; or the end."""
        return next((token for token in self.token_at[first:] if token > at), self.ended)


def prompts(count: int, dice: random.Random) -> list[Prompt]:
    """Different prompts; families share their first tokens, so that caches and `have_tokens` have work."""

    def ids(number: int) -> list[int]:
        return [dice.randrange(*TOKEN_IDS) for _ in range(number)]

    heads = [ids(SHARED_TOKENS) for _ in range(FAMILIES)]
    out = []
    for index in range(count):
        length, head = LENGTHS[index % len(LENGTHS)], heads[index % FAMILIES]
        shared = head if length > SHARED_TOKENS else []
        out.append(Prompt((*shared, *ids(length - len(shared))), dice.choice(OUTPUT_TOKENS)))
    return out


async def undisturbed(client: AsyncClient, asked: Sequence[Prompt], concurrency: int) -> list[tuple[int, ...]]:
    """The greedy answer to each prompt; raises LanewiseError where there is none."""
    answers: list[tuple[int, ...]] = [()] * len(asked)
    waiting = iter(range(len(asked)))

    async def work() -> None:
        for index in waiting:
            answers[index] = await _answer(client, asked[index], lambda: None)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return answers


class Traffic:
    """`run` keeps `concurrency` requests under way until `count` were made and `enough` agrees."""

    def __init__(
        self, client: AsyncClient, asked: Sequence[Prompt], answers: Sequence[tuple[int, ...]], dice: random.Random
    ) -> None:
        self.trips: list[Trip] = []
        self._client = client
        self._asked = asked
        self._answers = answers
        self._dice = dice

    async def run(self, count: int, concurrency: int, enough: Callable[[], bool]) -> None:
        async def work() -> None:
            while len(self.trips) < count or not enough():
                await self._one()

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())

    async def _one(self) -> None:
        which = self._dice.randrange(len(self._asked))
        prompt = self._asked[which]
        cancel_at = self._dice.randint(0, prompt.max_tokens) if self._dice.random() < CANCEL_SHARE else None
        trip = Trip(len(self.trips), time.monotonic())
        self.trips.append(trip)

        def on_accepted(request_id: str) -> None:
            trip.request_id = request_id

        def on_token() -> None:
            trip.token_at.append(time.monotonic())
            if cancel_at is not None and len(trip.token_at) >= cancel_at:
                raise _Leave

        try:
            async with asyncio.timeout(HANG_S):
                got = await _answer(self._client, prompt, on_token, on_accepted)
            trip.outcome = "ok" if got == self._answers[which] else "wrong"
            if trip.outcome == "wrong":
                trip.detail = f"prompt {which}: expected {self._answers[which]}, got {got}"
        except _Leave:
            trip.outcome = "cancelled"
        except TimeoutError:
            trip.outcome, trip.detail = "hung", f"prompt {which}: {len(trip.token_at)} tokens in {HANG_S:g} s"
        except LanewiseError as error:
            trip.outcome, trip.detail = str(error.code), error.message
        trip.ended = time.monotonic()
        times = [trip.started, *trip.token_at, trip.ended]
        if max(later - earlier for earlier, later in pairwise(times)) > SLOW_S:
            trip.story = await self._story(trip.request_id)

    async def _story(self, request_id: str) -> list[str]:
        """Asked for at once: the router remembers the latest requests only."""
        try:
            told = await self._client.explain(request_id)
        except LanewiseError as error:
            return [error.message]
        return [f"{step.at_ms:.0f} ms, epoch {step.epoch}: {step.what} {step.detail}" for step in told]


class _Leave(Exception):
    """The client goes away in the middle of its answer."""


async def _answer(
    client: AsyncClient,
    prompt: Prompt,
    on_token: Callable[[], None],
    on_accepted: Callable[[str], None] = lambda _: None,
) -> tuple[int, ...]:
    got: list[int] = []
    stream = client.generate(
        list(prompt.ids), max_tokens=prompt.max_tokens, temperature=0.0, ignore_eos=True, timeout_s=2 * HANG_S
    )
    async with aclosing(stream) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Accepted):
                on_accepted(event.request_id)
            elif isinstance(event, Delta):
                for token in event.token_ids:
                    got.append(token)
                    on_token()
            elif isinstance(event, Finished) and event.reason == "length":
                break
    return tuple(got)
