"""Which faults a campaign has: how many of each kind, at which process, at which state. Pure, and seeded.

Owns: the table of states that a fault can aim at, by role. The names are those of `transfer/faults.py`.
Must not: know time, processes' ids or files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

LETHAL = ("kill", "stop")
MESSAGE = ("drop", "duplicate", "delay", "corrupt", "truncate")
KINDS = (*LETHAL, *MESSAGE, "misbind")
SHARES = {"kill": 5, "stop": 5, "misbind": 10} | dict.fromkeys(MESSAGE, 16)
"""Of 100 faults. A killed worker takes seconds to come back, a lost message takes none."""

POINTS = {
    "prefill": (
        *("queued", "first_chunk_computing", "begin_sent", "send.offered", "send.streaming", "mid_chunk", "chunk_sent"),
        *("token1_sent", "send.await_ack", "commit_sent", "send.released"),
    ),
    "decode": (
        *("recv.offered", "grant_pending", "recv.granted", "grant_sent", "chunk_writing", "recv.receiving", "ack_sent"),
        *("recv.verifying", "recv.committed", "commit_ack_sent", "committed", "token_sent"),
    ),
}
MESSAGES = {"prefill": ("BEGIN", "CHUNK", "COMMIT", "PING"), "decode": ("GRANT", "ACK", "COMMIT_ACK", "PONG")}
RARE = {"prefill": ("HELLO", "PROBE", "ABORT"), "decode": ("HELLO_ACK", "PROBE_ACK", "ABORT_ACK", "NACK")}
"""Sent only when workers come back or requests are cancelled: aimed at now and then, and given up where none comes."""
RARE_SHARE = 0.05
_PERIODIC = ("PING", "PONG")  # one every two seconds
PAUSES_S = (0.3, 1.0, 2.5, 4.0, 6.0, 9.0)  # below, around and beyond every silence that counts as death
DELAYS_S = (0.02, 0.1, 0.5, 1.5, 3.0)


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    process: str
    kind: str
    state: str  # a point, or the type of the message
    nth: int
    delay_s: float = 0.0  # of a message
    pause_s: float = 0.0  # of a process

    @property
    def spec(self) -> str:
        tail = f":{self.delay_s * 1000:g}ms" if self.kind == "delay" else ""
        return f"{self.name}={self.kind}@{self.state}#{self.nth}{tail}"


def kinds_of(count: int, allowed: Sequence[str], dice: random.Random) -> list[str]:
    """`count` kinds in their shares, each at least once where there is room, in random order."""
    total = sum(SHARES[kind] for kind in allowed)
    kinds = [kind for kind in allowed for _ in range(max(1, count * SHARES[kind] // total))][:count]
    kinds += dice.choices(allowed, [SHARES[kind] for kind in allowed], k=count - len(kinds))
    dice.shuffle(kinds)
    return kinds


def draw(name: str, kind: str, processes: Sequence[str], dice: random.Random) -> Fault:
    """A fault of this kind at one of these processes ("prefill-0", "decode-1")."""
    if kind == "misbind":
        process = dice.choice([process for process in processes if process.startswith("prefill")])
        return Fault(name, process, kind, "begin", 1)
    process = dice.choice(list(processes))
    role = process.partition("-")[0]
    if kind in LETHAL:
        pause_s = dice.choice(PAUSES_S) if kind == "stop" else 0.0
        return Fault(name, process, kind, dice.choice(POINTS[role]), dice.randint(1, 3), pause_s=pause_s)
    rare = dice.random() < RARE_SHARE
    state = dice.choice((RARE if rare else MESSAGES)[role])
    delay_s = dice.choice(DELAYS_S) if kind == "delay" else 0.0
    return Fault(name, process, kind, state, 1 if rare or state in _PERIODIC else dice.randint(1, 3), delay_s)
