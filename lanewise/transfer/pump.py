"""Chunks of a prefill worker on their way out: read from pages, checksummed, sent the best way there is.

Owns: how much goes at a turn, and that a chunk's bytes are accounted for. Must not: decide which chunk is next
(`sender_core.py` does) or how its bytes are moved (`ways.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from msgspec.structs import replace as replace_fields

from lanewise.transfer import mac
from lanewise.transfer import messages as m
from lanewise.transfer.dealers import Connection, writable
from lanewise.transfer.faults import Faults, Frames
from lanewise.transfer.protocol import Action
from lanewise.transfer.records import Counters, Limits
from lanewise.transfer.send_window import Job
from lanewise.transfer.sender_core import SenderCore
from lanewise.transfer.sender_state import SenderTransfer
from lanewise.transfer.trial import Route
from lanewise.transfer.ways import Way, Ways

_CHUNKS_PER_TURN = 8  # then messages, commands and timers have their turn


class Host(Protocol):
    """What the sending thread does for its pump."""

    core: SenderCore
    counters: Counters
    faults: Faults
    limits: Limits

    def perform(self, actions: list[Action], now: float) -> None: ...
    def deliver(self, kind: str, frames: Sequence[bytes | memoryview], send: Callable[[Frames], None]) -> None: ...


class Pump:
    def __init__(self, host: Host, ways: Ways) -> None:
        self.backlog = False
        """There may be more to send at once."""
        self._host = host
        self._ways = ways

    def turn(self, connection: Connection, now: float) -> bool:
        """Sends chunks while there are any and something takes them; whether a data socket is waited for."""
        ways, address = self._ways, connection.address
        if ways.outlets and (outlet := ways.outlets.to(address)):
            refer = outlet.route is Route.REFERENCE and ways.refers

            def ready() -> bool:
                """References leave at once, however many: beyond a window of bytes that are not acknowledged the next
                chunk waits, so that a short prompt need not stand behind long ones."""
                if not refer:
                    return outlet.idle
                return outlet.takes_more and self._host.core.unacked_bytes(address) < self._host.limits.window_bytes

            self._by(ready, partial(ways.by_outlet, outlet), address, now, in_place=True, refer=refer)
            return False
        if (groups := ways.groups) and groups.joined(address):
            self._by(lambda: groups.port.writable, partial(ways.by_group, address), address, now)
            return False
        for sock in connection.data:
            if not self._by(partial(writable, sock), partial(ways.by_socket, sock), address, now):
                return False
        return True

    def _by(
        self,
        ready: Callable[[], bool],
        way: Way,
        address: str,
        now: float,
        *,
        in_place: bool = False,
        refer: bool = False,
    ) -> bool:
        """Chunks for an address, one way, until that is full; False: there are no more chunks."""
        for _ in range(_CHUNKS_PER_TURN):
            if not ready():
                return True
            chosen = self._host.core.next_chunk(address, refer=refer)
            if chosen is None:
                return False
            self._send(way, *chosen, now, in_place, refer)
        self.backlog = True
        return True

    def _send(self, way: Way, transfer: SenderTransfer, job: Job, now: float, in_place: bool, refer: bool) -> None:
        host = self._host
        faulty = host.faults.active  # a message may then go out again, or later: it must not be of pages or buffers
        try:
            load = self._ways.load(job, in_place=in_place and not faulty, refer=refer)
        except Exception as error:  # of the pool, whatever it is: this transfer ends, the others go on
            host.perform(host.core.abort(job.key, f"reading pages: {error}", now), now)
            return
        if faulty:
            load.buffer = None
        if load.crc:
            job = replace(job, words=True)
        crc = load.crc or m.chunk_checksum(job.words, *load.parts)
        accepted = True

        def send(frames: Frames) -> None:
            nonlocal accepted
            accepted = way(frames, load, now)

        chunk = transfer.chunk(job, crc)
        if transfer.mac_key:
            chunk = mac.signed(chunk, load.parts[0], transfer.mac_key)
        if load.runs:
            host.deliver("CHUNK", [m.encode(replace_fields(chunk, runs=load.runs))], send)
        else:
            host.deliver("CHUNK", [m.encode(chunk), *load.parts], send)
        host.counters.bytes_sent += load.num_bytes
        host.counters.chunks_sent += 1
        host.counters.chunks_referred += bool(load.runs)
        host.counters.chunks_resent += job.resend
        host.perform(host.core.sent(transfer, job, crc, accepted, now), now)
