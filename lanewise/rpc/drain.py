"""The end of a worker's life in order: finish, hand over, give back, stop.

Owns: the stages of a drain and their times. Must not: know the role's work, sockets or signals.

    unready, no new work -> finish in place for `timeout_s` -> ask for another pair to take over, and go on meanwhile
    until `max_s` -> give what is left back to the routers, which place it elsewhere or hold it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

POLL_S = 0.02
LINGER_S = 0.3  # a router may have sent work before it heard of the drain: it is refused, not cut off
GIVE_BACK_S = 2.0  # for the transfers of what was given back to end

log = structlog.get_logger(__name__)


class Draining(Protocol):
    """The worker's loop, as far as a drain needs it; every method returns at once."""

    def drain(self) -> None: ...
    def give_back(self) -> None: ...
    @property
    def idle(self) -> bool: ...


class Sessions(Protocol):
    """What the routers are told, by way of the statistics."""

    @property
    def num_sessions(self) -> int: ...
    def tell_draining(self) -> None: ...
    def tell_handover(self) -> None: ...


class Drain:
    """One per process; begun once, by SIGTERM or by the Drain call, whichever comes first."""

    def __init__(self, backend: Draining, sessions: Sessions, unready: Callable[[], Awaitable[None]]) -> None:
        self._backend = backend
        self._sessions = sessions
        self._unready = unready
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self, timeout_s: float, max_s: float) -> asyncio.Task[None]:
        """The task ends when the worker holds nothing any more. Begun before: the same task, the same times."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(timeout_s, max(timeout_s, max_s)))
        return self._task

    def hurry(self) -> None:
        """Do not wait any longer for anything to finish."""
        self._hurry.set()

    async def _run(self, timeout_s: float, max_s: float) -> None:
        started = asyncio.get_running_loop().time()
        log.info("draining", timeout_s=timeout_s, max_s=max_s)
        await self._unready()
        self._backend.drain()
        self._sessions.tell_draining()
        if await self._idle_by(started + timeout_s):
            return
        log.info("handing_over")
        self._sessions.tell_handover()
        if await self._idle_by(started + max_s):
            return
        log.warning("giving_back", reason="told to hurry" if self._hurry.is_set() else f"{max_s:g} s are over")
        self._backend.give_back()
        self._hurry.clear()
        if not await self._idle_by(asyncio.get_running_loop().time() + GIVE_BACK_S):
            log.error("drain_incomplete")

    async def _idle_by(self, deadline: float) -> bool:
        """Whether the worker fell idle in time, and stayed so for LINGER_S while a router is there to send more."""
        loop = asyncio.get_running_loop()
        idle_since: float | None = None
        while True:
            now = loop.time()
            if not self._backend.idle:
                idle_since = None
            elif idle_since is None:
                idle_since = now
            if idle_since is not None and (not self._sessions.num_sessions or now - idle_since >= LINGER_S):
                return True
            if self._hurry.is_set() or (now >= deadline and idle_since is None):
                return False
            # Polled, since the other side is a thread, which has no asyncio.Event.
            await asyncio.sleep(POLL_S)
