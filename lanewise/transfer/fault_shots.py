"""Faults that happen once, each with a name, and the record of those that have happened; used by faults.py.

Owns: counting towards the n-th time, and the file of hits, which outlives a process that a fault has killed.
Must not: know what a fault does.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WHATS = ("kill", "stop", "drop", "duplicate", "corrupt", "truncate", "delay", "misbind")
_SHOT = re.compile(rf"([\w-]+)=({'|'.join(WHATS)})@([\w.]+)(?:#(\d+))?(?::([\d.]+)ms)?")


@dataclass(slots=True)
class Shot:
    """One fault to come: `what` happens the `nth` time `target` (a point or a message type) is met."""

    name: str
    what: str
    target: str
    nth: int
    delay_s: float
    met: int = 0


def parse_shot(item: str) -> Shot | None:
    """None where the item is not of this form."""
    found = _SHOT.fullmatch(item)
    if found is None or (found[2] == "delay") != (found[5] is not None):
        return None
    return Shot(found[1], found[2], found[3], int(found[4] or 1), float(found[5] or 0) / 1000)


class Shots:
    def __init__(self, hits: Path | None = None) -> None:
        self._hits = hits
        self._armed: dict[str, Shot] = {}

    def __bool__(self) -> bool:
        return bool(self._armed)

    def replace(self, shots: list[Shot]) -> None:
        """The shots that are wanted now. What has hit stays away; what was counted so far goes on."""
        done = set(names_of_hits(self._hits)) if self._hits else set()
        self._armed = {shot.name: self._armed.get(shot.name, shot) for shot in shots if shot.name not in done}

    def armed(self, what: str) -> bool:
        return any(shot.what == what for shot in self._armed.values())

    def meet(self, target: str, *whats: str, request: str = "") -> Iterator[Shot]:
        """The target is met once more by faults of these kinds: those that are due, each recorded before it happens.

        `request`: the one it happens to, where it is one."""
        for shot in list(self._armed.values()):
            if shot.target != target or shot.what not in whats:
                continue
            shot.met += 1
            if shot.met >= shot.nth:
                del self._armed[shot.name]
                self._record(shot, request)
                yield shot

    def _record(self, shot: Shot, request: str) -> None:
        if self._hits is None:
            return
        line = f"{shot.name} {time.monotonic():.6f} {request}\n".encode()
        sink = os.open(self._hits, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(sink, line)  # one write: whole, even where the next moment is the process's last
        finally:
            os.close(sink)


def names_of_hits(file: Path) -> dict[str, tuple[float, str]]:
    """Fault name -> monotonic time of its hit and the request it happened to (or ""), of the lines that are whole."""
    try:
        lines = file.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    whole = (line[:-1].split(" ", 2) for line in lines if line.endswith("\n"))
    return {name: (float(at), request) for name, at, request in whole}
