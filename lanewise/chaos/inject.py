"""Doing harm: arms the fault hooks of running processes, watches for hits, resumes what was stopped.

Owns: the fault files of the service, and the record of every fault that hit. One process dies or sleeps at a time,
and the next only when the fleet is whole again; lost and damaged messages come at every process, all the time.
Must not: judge answers.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from lanewise.chaos.plan import LETHAL, Fault, draw, kinds_of
from lanewise.chaos.service import POLL_S, Service, until
from lanewise.transfer.fault_shots import names_of_hits

PATIENCE_S = 3.0  # a fault whose state is not reached by then is taken back, and another one drawn
AT_ONCE = 2  # message faults armed at each process
WHOLE_S = 180.0
FIRST_LETHAL_S = 8.0
GIVE_UP = 60  # draws in a row that met nothing: the state cannot be reached under this load


@dataclass(slots=True)
class Hit:
    fault: Fault
    at: float
    resumed_at: float = 0.0  # of a stopped process; else the same as `at`
    request: str = ""  # the router's name of the one request it happened to; empty: it may touch any


class Arms:
    """The fault files: what is armed at which process."""

    def __init__(self, directory: Path, processes: tuple[str, ...], always: str) -> None:
        self._directory = directory
        self._always = always
        self._armed: dict[str, dict[str, Fault]] = {process: {} for process in processes}
        directory.mkdir(exist_ok=True)
        for process in processes:
            self._write(process)

    def arm(self, fault: Fault) -> None:
        self._armed[fault.process][fault.name] = fault
        self._write(fault.process)

    def disarm(self, fault: Fault) -> None:
        self._armed[fault.process].pop(fault.name, None)
        self._write(fault.process)

    def hit(self, fault: Fault) -> tuple[float, str] | None:
        """When it hit, and which request ("": not one alone)."""
        return names_of_hits(self._directory / f"{fault.process}.hits").get(fault.name)

    def _write(self, process: str) -> None:
        """Replaced in one step: a process reads the old file or the new one."""
        items = [fault.spec for fault in self._armed[process].values()]
        fresh = self._directory / f"{process}.new"
        fresh.write_text(";".join([*items, self._always] if self._always else items))
        fresh.replace(self._directory / process)


class Injector:
    def __init__(self, service: Service, arms: Arms, count: int, kinds: tuple[str, ...], dice: random.Random) -> None:
        self.hits: list[Hit] = []
        self.missed = 0
        self._service = service
        self._arms = arms
        self._dice = dice
        self._drawn = 0
        wanted = kinds_of(count, kinds, dice)
        self._lethal = deque(kind for kind in wanted if kind in LETHAL)
        self._others = deque(kind for kind in wanted if kind not in LETHAL)
        self._left = len(wanted)
        self._lethal_count, self._other_count = len(self._lethal), len(self._others)
        self._lethal_since = time.monotonic()  # of the one under way
        self._lethal_s = FIRST_LETHAL_S  # how long one takes until the fleet is whole, lately
        self.unreachable: list[str] = []

    @property
    def done(self) -> bool:
        return self._left == 0

    async def run(self) -> None:
        """Until every fault of the campaign has hit."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._do_lethal())
            for process in self._service.workers * AT_ONCE:
                group.create_task(self._do_others(process))

    async def _do_lethal(self) -> None:
        while self._lethal:
            kind = self._lethal.popleft()
            self._lethal_since = time.monotonic()
            for _ in range(GIVE_UP):
                pids = {name: self._service.pid(name) for name in self._service.workers}
                hit = await self._try(self._draw(kind, self._service.workers))
                if hit is not None:
                    await self._after(hit, pids[hit.fault.process])
                    self._lethal_s += 0.3 * (time.monotonic() - self._lethal_since - self._lethal_s)
                    break
            else:
                self._abandon(kind)

    async def _do_others(self, process: str) -> None:
        role = process.partition("-")[0]
        tries = 0
        while self._others:
            if self._ahead:
                await asyncio.sleep(POLL_S)
                continue
            kind = self._others.popleft()
            if kind == "misbind" and role == "decode":
                self._others.append(kind)
                await asyncio.sleep(POLL_S)
                continue
            hit = await self._try(self._draw(kind, (process,)))
            tries = 0 if hit else tries + 1
            if hit is None and tries < GIVE_UP:
                self._others.append(kind)
            elif hit is None:
                self._abandon(kind)

    @property
    def _ahead(self) -> bool:
        """Deaths take longest: the others are spread over the whole campaign, so that no burst of them meets one
        request after the other and each is answered for its own delay."""
        if not self._lethal_count:
            return False
        current = min(1.0, (time.monotonic() - self._lethal_since) / self._lethal_s)
        done = self._lethal_count - len(self._lethal) - 1 + current
        hit = self._other_count - len(self._others)
        return hit > self._other_count * done / self._lethal_count and bool(self._lethal or current < 1.0)

    def _draw(self, kind: str, processes: tuple[str, ...]) -> Fault:
        self._drawn += 1
        return draw(f"f{self._drawn}", kind, processes, self._dice)

    def _abandon(self, kind: str) -> None:
        self.unreachable.append(kind)
        self._left -= 1

    async def _try(self, fault: Fault) -> Hit | None:
        """Arms it and waits for its moment."""
        self._arms.arm(fault)
        ends = time.monotonic() + PATIENCE_S
        while (found := self._arms.hit(fault)) is None and time.monotonic() < ends:  # noqa: ASYNC110 (a file is watched)
            await asyncio.sleep(POLL_S)
        self._arms.disarm(fault)
        if found is None:
            found = self._arms.hit(fault)  # between the last look and the new file
        if found is None:
            self.missed += 1
            return None
        hit = Hit(fault, found[0], found[0], found[1])
        self.hits.append(hit)
        if fault.kind not in LETHAL:
            self._left -= 1
        return hit

    async def _after(self, hit: Hit, pid: int) -> None:
        """Brings the fleet back to its full size."""
        if hit.fault.kind == "stop":
            self._service.stopped.add(pid)
            await asyncio.sleep(max(0.0, hit.at + hit.fault.pause_s - time.monotonic()))
            os.kill(pid, signal.SIGCONT)
            hit.resumed_at = time.monotonic()
            self._service.stopped.discard(pid)
        else:
            await until(
                lambda: self._service.pid(hit.fault.process) not in (0, pid),
                WHOLE_S,
                lambda: f"{hit.fault.process} was not restarted:\n{self._service.log_tail()}",
            )
        await until(self._service.whole, WHOLE_S, lambda: f"the fleet is not whole:\n{self._service.log_tail()}")
        self._left -= 1
