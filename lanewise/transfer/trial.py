"""Which way data goes to one partner: test blocks by each way there is, and the fastest way wins. Pure.

Owns: the order of the tests and what was measured. Must not: send anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from lanewise.transfer import messages as m
from lanewise.transfer.neighbour import pack

TRIES = 3
"""Blocks by each way; the fastest counts, for what else the machine does only ever makes it slower."""
ANSWER_S = 1.0
_FAVOUR = 2.0
"""A reference costs the sender's core nothing but a checksum, and that core computes prompts: it may take so much
longer. On an idle machine it takes half as long. Likewise bytes by the direct connection, which spare both sides a copy
of what goes by ZeroMQ, and a thread."""
_PATTERN_BYTES = 4096


class References(StrEnum):
    """Whether a partner may be told where chunks lie, to read them itself."""

    NEVER = "never"
    AUTO = "auto"  # where it can, and where that is the fastest way
    ALWAYS = "always"  # a partner that cannot is none


class Route(StrEnum):
    ZEROMQ = "zeromq"
    BYTES = "bytes"  # by the direct connection
    REFERENCE = "reference"


Refer = Callable[[memoryview], tuple[bytes, bytes]]
"""References to a test block, this one or another of its size, and its checksum."""


def _refer(block: memoryview) -> tuple[bytes, bytes]:
    return pack([block]), m.checksum(block)


@dataclass(slots=True)
class Trial:
    """Of one connection that is up; `source` and `target` are the incarnations at its ends."""

    source: str
    target: str
    num_bytes: int
    routes: tuple[Route, ...]
    refer: Refer = _refer
    seconds: dict[Route, float] = field(default_factory=dict)
    due_at: float = 0.0
    _block: bytearray = field(default_factory=bytearray)
    _number: int = -1
    _nonce: int = -1
    _crc: bytes = b""
    _sent_at: float = 0.0

    def next(self, now: float) -> tuple[m.Probe, memoryview | None] | None:
        """The next test and, where its header does not refer to it, the block to send; None: all are done."""
        self._number += 1
        if self._number >= TRIES * len(self.routes):
            return None
        dice = random.Random(f"{self.source}/{self.target}/{now}")  # contents of test blocks, nothing secret
        if not self._block:
            self._block = bytearray(dice.randbytes(_PATTERN_BYTES) * (self.num_bytes // _PATTERN_BYTES + 1))
            del self._block[self.num_bytes :]
        self._nonce = dice.getrandbits(62)
        tag = self._nonce.to_bytes(8, "little")  # what lies there from the last test must not do for this one
        self._block[: len(tag)] = tag[: self.num_bytes]
        self._sent_at, self.due_at = now, now + ANSWER_S
        refer = self.route is Route.REFERENCE
        block = memoryview(self._block)
        runs, self._crc = self.refer(block) if refer else (b"", m.checksum(block))
        probe = m.Probe(self.source, self.target, self._nonce, self._crc, runs)
        return probe, None if refer else block

    @property
    def route(self) -> Route:
        """Of the present test."""
        return self.routes[self._number % len(self.routes)]

    def heard(self, ack: m.ProbeAck, now: float) -> bool:
        """Whether this answers the present test, rightly."""
        if ack.nonce != self._nonce or ack.crc != self._crc:
            return False
        taken = max(now - self._sent_at, 1e-6)
        self.seconds[self.route] = min(taken, self.seconds.get(self.route, taken))
        return True

    def best(self) -> Route | None:
        """None: no way works."""
        chosen, least = None, float("inf")
        for route in (Route.ZEROMQ, Route.BYTES, Route.REFERENCE):  # each spares the cores more than those before
            seconds = self.seconds.get(route)
            if seconds is not None and seconds <= _FAVOUR * least:
                chosen = route
                least = min(least, seconds)
        return chosen

    def __str__(self) -> str:
        rates = (f"{route} {self.num_bytes / 1e9 / seconds:.1f} GB/s" for route, seconds in self.seconds.items())
        return ", ".join(rates) or "no answer"
