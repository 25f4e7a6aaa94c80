"""Which links of a worker move their data through a process group, and who is at the other end. Used by both sides.

Must not: know transfers. While a group is broken its link goes on over ZeroMQ; it is tried again under a new name.
"""

from __future__ import annotations

import logging
import select
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from lanewise.errors import ConfigError
from lanewise.transfer import messages as m
from lanewise.transfer.group_port import MAX_HEADER_BYTES, MAX_PAIRS, GroupPort

log = logging.getLogger("lanewise.transfer")

RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
START_S = 120.0  # torch is slow to load where a machine has little to spare
_SENDER, _RECEIVER = 0, 1


@dataclass(slots=True)
class _Pair:
    name: str
    address: str
    partner: str
    port: int
    joined: bool = False
    tries: int = 1
    again_at: float = float("inf")  # when a broken one is tried anew


class SenderGroups:
    def __init__(
        self, incarnation: str, host: str, slot_bytes: int, on_broken: Callable[[str], None], device: str = "cpu"
    ) -> None:
        """`on_broken(address)`: what was sent there and not acknowledged may be lost."""
        self.port = GroupPort(host, slot_bytes, serve=False, on_event=self._on_event, device=device)
        self._incarnation = incarnation
        self._on_broken = on_broken
        self._pairs: dict[str, _Pair] = {}  # by address

    def greeted(self, address: str, ack: m.HelloAck) -> m.Join | None:
        """What to tell a partner that has answered HELLO, where it has process groups and none with us."""
        pair = self._pairs.get(address)
        if not ack.group_port or ack.refusal or (pair and pair.partner == ack.src):
            return None
        self.forget(address)  # of an incarnation that was there before
        pair = self._pairs[address] = _Pair("", address, ack.src, ack.group_port)
        return self._join(pair)

    def due(self, now: float) -> list[tuple[str, m.Join]]:
        """(address, what to say there) for each group that broke and is tried again."""
        late = [pair for pair in self._pairs.values() if pair.again_at <= now]
        return [(pair.address, self._join(pair)) for pair in late]

    def forget(self, address: str) -> None:
        """Nothing uses this address any more."""
        if pair := self._pairs.pop(address, None):
            self.port.leave(pair.name)

    def _join(self, pair: _Pair) -> m.Join:
        pair.name, pair.again_at = uuid.uuid4().hex, float("inf")
        host = pair.address.rpartition("://")[2].rpartition(":")[0].strip("[]")
        self.port.join(pair.name, _SENDER, host, pair.port)
        return m.Join(self._incarnation, pair.partner, pair.name)

    def joined(self, address: str) -> bool:
        """Whether data for this address goes by a group."""
        pair = self._pairs.get(address)
        return pair is not None and pair.joined

    def send(self, address: str, header: bytes, payload: bytes | memoryview) -> bool:
        """False: nothing could take it."""
        pair, slot = self._pairs.get(address), self.port.take()
        if pair is None or slot is None or len(header) > MAX_HEADER_BYTES:
            return False
        self.port.slot(slot, len(payload))[:] = payload
        self.port.send(pair.name, slot, header, len(payload))
        return True

    def _on_event(self, word: str, *rest: object) -> None:
        named = [pair for pair in self._pairs.values() if word == "dead" or (rest and pair.name == rest[0])]
        for pair in named:
            if word == "joined":
                pair.joined = True
            elif word in ("broken", "dead"):
                log.warning("process group with %s ended: %s; ZeroMQ carries on", pair.partner, rest[-1])
                pair.joined = False
                pair.again_at = time.monotonic() + min(RETRY_S * 2**pair.tries, LONGEST_RETRY_S)
                pair.tries += 1
                self._on_broken(pair.address)


class ReceiverGroups:
    def __init__(
        self, host: str, slot_bytes: int, on_chunk: Callable[[str, bytes, memoryview], None], device: str = "cpu"
    ) -> None:
        """`on_chunk(incarnation of the sender, header, payload)`; the payload is lent for the call."""
        self.port = GroupPort(host, slot_bytes, serve=True, on_event=self._on_event, device=device)
        self.store_port = 0
        self._on_chunk = on_chunk
        self._partners: dict[str, str] = {}  # by pair

    def wait(self) -> None:
        """Until partners can meet here; ConfigError where that takes too long. Before the transfer thread starts."""
        ends = time.monotonic() + START_S
        while not self.store_port:
            select.select([self.port.socket], [], [], max(0.0, ends - time.monotonic()))
            self.port.on_readable()
            if not self.port.alive:
                raise ConfigError("the process for channel NCCL ended at its start; its own output says why")
            if not self.store_port and time.monotonic() >= ends:
                raise ConfigError(f"the process for channel NCCL did not start within {START_S:g} s")

    def join(self, join: m.Join) -> None:
        if len(self._partners) < MAX_PAIRS and join.group not in self._partners:
            self._partners[join.group] = join.src
            self.port.join(join.group, _RECEIVER)

    def _on_event(self, word: str, *rest: object) -> None:
        match (word, *rest):
            case ("up", int(port)):
                self.store_port = port
            case ("chunk", str(pair), int(slot), bytes(header), int(num_bytes)):
                self._on_chunk(self._partners[pair], header, self.port.slot(slot, num_bytes))
                self.port.done(slot)
            case ("broken", str(pair), reason):
                log.warning("process group with %s ended: %s", self._partners.pop(pair, pair), reason)
            case ("dead", reason):
                log.warning("the process for process groups ended: %s; ZeroMQ carries on", reason)
                self._partners.clear()
                self.store_port = 0
            case _:
                pass  # joined
