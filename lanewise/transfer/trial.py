"""Which way data goes to one partner: test blocks by each way there is, and the fastest way wins. Pure.

Owns: the order of the tests and what was measured. Must not: send anything.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum

from lanewise.transfer import messages as m
from lanewise.transfer.neighbour import pack

TRIES = 3
"""Blocks by each way; the fastest counts, for what else the machine does only ever makes it slower."""
ANSWER_S = 1.0
_FAVOUR = 2.0
"""A reference costs the sender's core nothing but a checksum, and that core computes prompts: it may take so much
longer. On an idle machine it takes half as long."""
_PATTERN_BYTES = 4096


class References(StrEnum):
    """Whether a partner may be told where chunks lie, to read them itself."""

    NEVER = "never"
    AUTO = "auto"  # where it can, and where that is the fastest way
    ALWAYS = "always"  # a partner that cannot is none


class Route(StrEnum):
    BYTES = "bytes"
    REFERENCE = "reference"


@dataclass(slots=True)
class Trial:
    """Of one connection that is up; `source` and `target` are the incarnations at its ends."""

    source: str
    target: str
    num_bytes: int
    routes: tuple[Route, ...]
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
        refer = self._route is Route.REFERENCE
        block = memoryview(self._block)
        self._crc = m.checksum(block)
        probe = m.Probe(self.source, self.target, self._nonce, self._crc, pack([block]) if refer else b"")
        return probe, None if refer else block

    @property
    def _route(self) -> Route:
        return self.routes[self._number % len(self.routes)]

    def heard(self, ack: m.ProbeAck, now: float) -> bool:
        """Whether this answers the present test, rightly."""
        if ack.nonce != self._nonce or ack.crc != self._crc:
            return False
        taken = max(now - self._sent_at, 1e-6)
        self.seconds[self._route] = min(taken, self.seconds.get(self._route, taken))
        return True

    def best(self) -> Route | None:
        """None: no way works."""
        by_bytes, refer = (self.seconds.get(route) for route in (Route.BYTES, Route.REFERENCE))
        if refer is not None and (by_bytes is None or refer <= _FAVOUR * by_bytes):
            return Route.REFERENCE
        return None if by_bytes is None else Route.BYTES

    def __str__(self) -> str:
        rates = (f"{route} {self.num_bytes / 1e9 / seconds:.1f} GB/s" for route, seconds in self.seconds.items())
        return ", ".join(rates) or "no answer"
