"""The prefill workers that have greeted this receiver and are alive. Pure.

Owns: the answer to HELLO, and when a silent sender counts as dead.
Must not: know transfers.
"""

from __future__ import annotations

from lanewise.transfer import compat
from lanewise.transfer import messages as m
from lanewise.transfer.records import Endpoint, Limits, Timers


class KnownSenders:
    def __init__(self, identity: Endpoint, timers: Timers, limits: Limits) -> None:
        self._identity = identity
        self._timers = timers
        self._limits = limits
        self._heard: dict[str, float] = {}

    def __contains__(self, incarnation: str) -> bool:
        return incarnation in self._heard

    def heard(self, incarnation: str, now: float) -> None:
        if incarnation in self._heard:
            self._heard[incarnation] = now

    def hello(self, hello: m.Hello, now: float) -> m.HelloAck:
        refusal = compat.differences(self._identity, hello)
        if not refusal and hello.src not in self._heard and len(self._heard) >= self._limits.max_peers:
            refusal = "too many senders"
        if not refusal:
            self._heard[hello.src] = now
        return compat.hello_ack(self._identity, hello.src, refusal, self._limits.max_chunk_bytes)

    def take_dead(self, now: float) -> list[str]:
        """Senders that have been silent too long; they must greet again."""
        dead = [peer for peer, heard in self._heard.items() if now >= heard + self._timers.dead_s]
        for peer in dead:
            del self._heard[peer]
        return dead

    @property
    def deadline(self) -> float:
        return min(self._heard.values(), default=float("inf")) + self._timers.dead_s
