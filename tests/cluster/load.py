"""Users of a service in a cluster: streams through the Service's name and address, kept running while things happen.

Owns: a loop in a thread of its own, and the record of every stream. Must not: know pods or the operator.
A stream is *failed* when it ends with an error or without a finish reason, *altered* when its text is none that the
undisturbed service gives for that prompt.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import aiohttp

MODEL = "fable"
SEED = 7
STREAM_DEADLINE_S = 180.0
JOIN_DEADLINE_S = 200.0
STORY = (
    "A fox saw a crow with a piece of cheese in her beak, sitting high upon the branch of a tree. He walked up to the "
    "foot of the tree and said: good day, mistress crow, how well you are looking today! "
)


def prompt(number: int) -> str:
    """One of sixteen prompts of 40 to 200 tokens."""
    return f"Fable {number % 16}. " + STORY * (1 + number % 4)


@dataclass
class Stream:
    """What one user saw; times are Unix seconds, `request` is the id that the answer carries."""

    prompt: str
    started: float
    request: str = ""
    text: str = ""
    num_events: int = 0
    first_at: float | None = None
    last_at: float | None = None
    ended: float | None = None
    finish: str = ""
    error: str = ""

    @property
    def generating(self) -> bool:
        """Past its first token and not at its end."""
        return self.first_at is not None and self.ended is None

    @property
    def failed(self) -> bool:
        return self.ended is not None and (bool(self.error) or self.finish not in ("stop", "length"))


@dataclass
class Load:
    """`address` gives HOST:PORT for each new stream, so that a name is looked up as often as a user would."""

    address: Callable[[], str]
    tokens: int = 200
    concurrency: int = 16
    streams: list[Stream] = field(default_factory=list)
    problem: BaseException | None = None

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets the streams that run finish; starts no more."""
        self._stop.set()
        self._thread.join(JOIN_DEADLINE_S)
        if error is None:
            assert not self._thread.is_alive(), "the load did not end"
            if self.problem is not None:
                raise self.problem

    def running(self) -> list[Stream]:
        return [stream for stream in list(self.streams) if stream.ended is None]

    def generating(self) -> list[Stream]:
        return [stream for stream in list(self.streams) if stream.generating]

    def _run(self) -> None:
        try:
            asyncio.run(self._users())
        except BaseException as error:  # re-raised by the test's thread
            self.problem = error

    async def _users(self) -> None:
        connector = aiohttp.TCPConnector(force_close=True, limit=0, use_dns_cache=False)
        timeout = aiohttp.ClientTimeout(total=STREAM_DEADLINE_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
            for user in range(self.concurrency):
                group.create_task(self._user(session, user))

    async def _user(self, session: aiohttp.ClientSession, user: int) -> None:
        number = user
        while not self._stop.is_set():
            stream = Stream(prompt(number), time.time())
            self.streams.append(stream)
            await consume(session, self.address, stream, self.tokens)
            number += self.concurrency + 1
            if stream.failed:
                await asyncio.sleep(0.2)


async def consume(session: aiohttp.ClientSession, address: Callable[[], str], stream: Stream, tokens: int) -> None:
    """Runs one stream to its end; whatever goes wrong is written into it."""
    # Sampled, since a small model soon repeats itself otherwise; with a seed, so that the text is always the same.
    body = {"model": MODEL, "prompt": stream.prompt, "max_tokens": tokens, "temperature": 0.9, "seed": SEED}
    try:
        host = await asyncio.to_thread(address)
        async with session.post(
            f"http://{host}/v1/completions", json=body | {"stream": True, "ignore_eos": True}
        ) as reply:
            if reply.status != 200:
                stream.error = f"{reply.status}: {(await reply.text())[:500]}"
                return
            async for line in reply.content:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    _take(stream, json.loads(line[6:]))
    except (aiohttp.ClientError, AssertionError, OSError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    finally:
        stream.ended = time.time()


def _take(stream: Stream, event: dict[str, object]) -> None:
    if "error" in event:
        stream.error = json.dumps(event["error"])
        return
    stream.request = str(event.get("id") or stream.request)
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        stream.last_at = time.time()
        stream.first_at = stream.first_at or stream.last_at
        stream.num_events += 1
        stream.text += choice.get("text") or ""
        stream.finish = choice.get("finish_reason") or stream.finish


async def _undisturbed(address: Callable[[], str], tokens: int) -> dict[str, str]:
    timeout = aiohttp.ClientTimeout(total=STREAM_DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
        streams = [Stream(prompt(number), time.time()) for number in range(16)]
        for stream in streams:
            group.create_task(consume(session, address, stream, tokens))
    failed = [stream for stream in streams if stream.failed]
    assert not failed, f"undisturbed streams failed: {failed[:2]}"
    return {stream.prompt: stream.text for stream in streams}


def undisturbed(address: Callable[[], str], tokens: int) -> dict[str, str]:
    """The text that belongs to each prompt, from a service that nobody disturbs."""
    return asyncio.run(_undisturbed(address, tokens))
