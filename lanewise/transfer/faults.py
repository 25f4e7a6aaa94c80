"""Deliberate faults for tests of the protocol: lost, doubled, late, damaged messages, and death at a named point.

Owns: the grammar of LANEWISE_FAULTS_SPEC and the dice. Off unless LANEWISE_FAULTS=1, and then only on loopback.
Must not: be needed by anything; an empty `Faults()` does nothing.

    LANEWISE_FAULTS_SPEC = spec | "@" file that holds a spec and is read again whenever it changes
                         | "@" directory "/"                   the same, in the file named as the process is
    spec  = item *( ";" item )
    item  = ( "kill" | "stop" ) "@" point [ "#" n ]              at the n-th time (default 1) the point is reached
          | ( "drop" | "duplicate" | "corrupt" | "truncate" ) ":" TYPE ":" probability [ ":seed" n ]
          | "delay" ":" TYPE ":" probability ":" milliseconds "ms" [ ":seed" n ]
          | name "=" kind "@" ( point | TYPE ) [ "#" n ] [ ":" milliseconds "ms" ]
                                                               once; the hit is recorded in the file with suffix .hits
          | "unbound"                                          decode: accept KV whatever prompt it was computed from
    TYPE  = a message type as in docs/kv-channel.md, or "*"
    kind  = kill | stop | drop | duplicate | corrupt | truncate | delay | misbind

Points: "<type>_sent" in lower case for every message type ("begin_sent", "commit_sent", "mid_chunk" between the two
frames of a chunk, "chunk_writing" before a copy into the pool), every state entered ("send.streaming",
"recv.verifying", "link.up") and whatever names the worker loops pass to `point`. `misbind@begin`: the prefill worker
serves a request with the ids and pages of another one of the same length (`prefill_worker/decoys.py`).
"""

from __future__ import annotations

import ipaddress
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lanewise.errors import ConfigError
from lanewise.transfer.fault_shots import Shot, Shots, parse_shot
from lanewise.transfer.messages import MalformedMessage, decode

Frames = list[bytes | memoryview]

_KILL = re.compile(r"(kill|stop)@([\w.]+)(?:#(\d+))?")
_MESSAGE = re.compile(r"(drop|duplicate|corrupt|truncate|delay):(\*|[A-Z_]+):([\d.]+)(?::([\d.]+)ms)?(?::seed(\d+))?")


@dataclass(slots=True)
class _Rule:
    what: str
    kind: str
    probability: float
    delay_s: float
    dice: random.Random

    @classmethod
    def of(cls, shot: Shot) -> _Rule:
        return cls(shot.what, shot.target, 1.0, shot.delay_s, random.Random(shot.name))


@dataclass(frozen=True, slots=True)
class Delivery:
    """One copy of a message to send, after a pause."""

    delay_s: float
    frames: Frames


@dataclass(slots=True)
class Faults:
    """Of one process; its methods may be called from any thread."""

    rules: list[_Rule] = field(default_factory=list)
    deaths: dict[str, tuple[int, signal.Signals]] = field(default_factory=dict)
    reached: Counter[str] = field(default_factory=Counter)
    shots: Shots = field(default_factory=Shots)
    unbound: bool = False
    file: Path | None = None
    file_stamp: tuple[int, int, int] = (0, 0, 0)
    lock: threading.RLock = field(default_factory=threading.RLock)
    active: bool = False
    """Whether there have ever been any faults to come; asked several times per message."""

    def __post_init__(self) -> None:
        self.active = bool(self.rules or self.deaths or self.shots or self.unbound or self.file)

    @classmethod
    def parse(cls, spec: str) -> Faults:
        faults = cls()
        faults._take(spec)
        return faults

    @classmethod
    def from_env(cls, environment: Mapping[str, str], addresses: Iterable[str], name: str = "") -> Faults:
        """Faults of this process; refuses (ConfigError) where they could hurt anybody: an address beyond loopback."""
        if environment.get("LANEWISE_FAULTS") != "1":
            return cls()
        for address in addresses:
            if not is_loopback(address):
                raise ConfigError(f"LANEWISE_FAULTS=1 is allowed on loopback only, not with {address}")
        spec = environment.get("LANEWISE_FAULTS_SPEC", "")
        if not spec.startswith("@"):
            return cls.parse(spec)
        file = Path(spec[1:]) / name if spec.endswith("/") else Path(spec[1:])
        faults = cls(file=file, shots=Shots(file.with_name(file.name + ".hits")))
        faults._read_again()
        return faults

    def _take(self, spec: str) -> None:
        rules, deaths, shots, unbound = [], {}, [], False
        for item in filter(None, (part.strip() for part in spec.split(";"))):
            if found := _KILL.fullmatch(item):
                number = signal.SIGKILL if found[1] == "kill" else signal.SIGSTOP
                deaths[found[2]] = (int(found[3] or 1), number)
            elif (found := _MESSAGE.fullmatch(item)) and (found[1] == "delay") == (found[4] is not None):
                dice = random.Random(int(found[5] or 0))
                rules.append(_Rule(found[1], found[2], float(found[3]), float(found[4] or 0) / 1000, dice))
            elif shot := parse_shot(item):
                shots.append(shot)
            elif item == "unbound":
                unbound = True
            else:
                raise ConfigError(f"LANEWISE_FAULTS_SPEC: cannot read {item!r}")
        self.rules, self.deaths, self.unbound, self.reached = rules, deaths, unbound, Counter()
        self.shots.replace(shots)
        self.__post_init__()

    def _read_again(self) -> None:
        """Take the file's present spec, so that a campaign can aim at a process that runs already."""
        if self.file is None:
            return
        found = self.file.stat()
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp != self.file_stamp:
            self._take(self.file.read_text())
            self.file_stamp = stamp

    def armed(self, what: str) -> bool:
        """Whether a single fault of this kind waits for its moment."""
        if not self.active:
            return False
        with self.lock:
            self._read_again()
            return self.shots.armed(what)

    def take(self, what: str, target: str, request: str) -> bool:
        """Whether a fault that the caller carries out happens now, to this request: one of those that are due."""
        with self.lock:
            return next(self.shots.meet(target, what, request=request), None) is not None

    def point(self, name: str) -> None:
        """The process reached a named point; it may not get further."""
        if not self.active:
            return
        with self.lock:
            self._read_again()
            for shot in self.shots.meet(name, "kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if shot.what == "kill" else signal.SIGSTOP)
            if not self.deaths:
                return
            self.reached[name] += 1
            death = self.deaths.get(name)
            if death is not None and self.reached[name] == death[0]:
                os.kill(os.getpid(), death[1])

    def deliveries(self, kind: str, frames: Sequence[bytes | memoryview]) -> list[Delivery]:
        """What becomes of an outgoing message: nothing, one copy or several, now or later, perhaps damaged."""
        with self.lock:
            self._read_again()
            request = _request_of(frames) if self.shots else ""
            due = self.shots.meet(kind, "drop", "duplicate", "corrupt", "truncate", "delay", request=request)
            rules = [*self.rules, *(_Rule.of(shot) for shot in due)]
        out = [Delivery(0.0, list(frames))]
        for rule in rules:
            if rule.kind not in ("*", kind) or rule.dice.random() >= rule.probability:
                continue
            match rule.what:
                case "drop":
                    return []
                case "duplicate":
                    out += [Delivery(each.delay_s, list(each.frames)) for each in out]
                case "delay":
                    out = [Delivery(each.delay_s + rule.delay_s, each.frames) for each in out]
                case _:
                    out = [Delivery(each.delay_s, _damage(each.frames, rule)) for each in out]
        return out


def _request_of(frames: Sequence[bytes | memoryview]) -> str:
    """The request whose transfer a message belongs to; empty: none."""
    try:
        return getattr(decode(frames[0]), "request_id", "")
    except MalformedMessage:  # only a test sends such
        return ""


def _damage(frames: Frames, rule: _Rule) -> Frames:
    index = rule.dice.randrange(len(frames))
    frame = bytearray(frames[index])
    if frame and rule.what == "corrupt":
        frame[rule.dice.randrange(len(frame))] ^= 1 << rule.dice.randrange(8)
    else:
        del frame[rule.dice.randrange(max(1, len(frame))) :]
    return [*frames[:index], bytes(frame), *frames[index + 1 :]]


def is_loopback(address: str) -> bool:
    """Whether "host:port" or "tcp://host:port" names this machine only."""
    host = address.split("://", 1)[-1].rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host)
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        return (mapped or found).is_loopback
    except ValueError:
        return False
