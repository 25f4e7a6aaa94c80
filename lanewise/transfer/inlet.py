"""One direct connection from a prefill worker, and where the bytes of the message that it is at go.

Owns: reading greeting, heads and payloads as they come, without waiting. Must not: know transfers, or who may connect.
"""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import xxhash

from lanewise.transfer import direct
from lanewise.transfer.messages import Probe
from lanewise.transfer.neighbour import Neighbour
from lanewise.transfer.protocol import Write

if TYPE_CHECKING:
    from lanewise.transfer.ipc_link import Mapped

_BYTES_PER_TURN = 4 << 20  # of one connection; then ACKs go out, and commands and timers have their turn
_STEP_BYTES = 512 << 10
"""Bytes of one system call: so few are still in the core's cache when they are checksummed."""
_FETCH_BYTES = 1 << 20
"""Likewise, of another process's memory: a call there costs more."""
_WAKE_BYTES = 256 << 10
"""The kernel says that there is something to read only when it is worth it, or all that is to come."""


class Owner(Protocol):
    max_chunk_bytes: int
    scratch: memoryview  # for bytes that nobody wants

    def admit(self, inlet: Inlet, greeting: direct.Greeting, now: float) -> str:
        """The author of all that comes by this connection; NotASender where it must not be."""

    def open(self, inlet: Inlet, header: memoryview, num_bytes: int, now: float) -> Sink:
        """Where the payload announced by this header goes."""

    def finish(self, sink: Sink, now: float) -> None:
        """All bytes of a message are here."""

    def drop(self, inlet: Inlet, now: float, *, malformed: bool = False) -> None:
        """The connection has ended, or said what no sender says."""


Fetch = Callable[[Sequence[memoryview]], None]
"""Fills these parts with what comes next; OSError where it cannot."""


class Sink:
    """Where the bytes of one message go."""

    def __init__(
        self,
        num_bytes: int,
        write: Write | None = None,
        *,
        pages: list[memoryview] | None = None,
        staged: memoryview | None = None,
        probe: Probe | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        """Into `pages`, or `staged` as a whole; without either the bytes are thrown away.

        `fetch`: they do not come by the connection, but from where this gets them."""
        self.left = num_bytes
        self.write = write
        self.staged = staged
        self.probe = probe
        self.failed = False  # to be fetched
        self._fetch = fetch
        self._pages = pages or []
        self._parts = list(self._pages) if fetch is None else self._pages
        self._ends = list(accumulate(map(len, self._parts))) if fetch is None else []
        self._at = 0
        self._taken = 0
        self._state = xxhash.xxh3_64()

    @property
    def at_hand(self) -> bool:
        """Nothing that comes later by the connection tells that the bytes are there."""
        return self._fetch is not None

    @property
    def checksum(self) -> bytes:
        """Of what went into pages."""
        return self._state.digest()

    def take(self, sock: socket.socket, scratch: memoryview) -> int:
        """Bytes that were taken; 0: the connection has ended. BlockingIOError: there is nothing now."""
        if self._fetch is not None:
            return self._get(self._fetch)
        if not self._parts:
            into = scratch[: self.left] if self.staged is None else self.staged[-self.left :]
            got = sock.recv_into(into)
            self.left -= got
            return got
        at = self._at
        count = _STEP_BYTES // len(self._parts[at]) + 1
        got = sock.recvmsg_into(self._parts[at : at + count])[0]
        self.left -= got
        self._taken += got
        self._at = bisect_right(self._ends, self._taken, at)
        update = self._state.update
        for part in self._parts[at : self._at]:
            update(part)
        filled = got if self._at == at else self._taken - self._ends[self._at - 1]  # of the part that is not full
        if filled:
            part = self._parts[self._at]
            update(part[:filled])
            self._parts[self._at] = part[filled:]
        return got

    def _get(self, fetch: Fetch) -> int:
        """All at once. What is checksummed is what lies here now: the sender's memory may be another's by then."""
        got, self.left = self.left, 0
        update = self._state.update
        try:
            for step in _in_steps([self.staged] if self.staged is not None else self._parts, got):
                fetch(step)
                for part in step if self.staged is None else ():  # what is staged is checked when it is written
                    update(part)
        except OSError:
            self.failed = True
        return got

    def wipe(self) -> None:
        """Zeros in place of what was not verified: a NaN left in a page would spread to whoever has it next."""
        for page in self._pages:
            page[:] = bytes(len(page))

    def let_go(self) -> None:
        """From here on no page is written."""
        self._pages, self._parts = [], []
        self.write = self.staged = None


def _in_steps(parts: Sequence[memoryview], num_bytes: int) -> Iterator[Sequence[memoryview]]:
    """The parts in turn, cut so that a step is _FETCH_BYTES, or less at the end."""
    if num_bytes <= _FETCH_BYTES:
        yield parts
        return
    step: list[memoryview] = []
    room = _FETCH_BYTES
    for part in parts:
        left = part
        while len(left) >= room:
            yield [*step, left[:room]]
            left, step, room = left[room:], [], _FETCH_BYTES
        if len(left):
            step.append(left)
            room -= len(left)
    if step:
        yield step


class Inlet:
    """One connection."""

    def __init__(self, sock: socket.socket, owner: Owner, now: float) -> None:
        self.sock = sock
        self.author = ""
        self.silent_until = now + direct.SILENT_S
        self.neighbour: Neighbour | None = None
        self.mapped: Mapped | None = None  # of its GPU's memory
        self.sink: Sink | None = None
        self.staging = bytearray()
        self._owner = owner
        self._head = memoryview(bytearray(max(direct.MAX_HEADER_BYTES, direct.GREETING_BYTES)))
        self._have = 0
        self._want = direct.GREETING_BYTES
        self._payload_bytes = -1  # known while the header is read
        self._wakes_at = 1

    def on_ready(self, now: float) -> None:
        taken = 0
        while taken < _BYTES_PER_TURN or (self.sink and self.sink.at_hand):
            try:
                got = self.sink.take(self.sock, self._owner.scratch) if self.sink else self._more_of_head()
            except BlockingIOError:
                break
            except OSError:
                got = 0
            good = not got or self._went_on(now)
            if not got or not good:
                self._owner.drop(self, now, malformed=not good)
                return
            taken += got
        self._wait()

    def _more_of_head(self) -> int:
        got = self.sock.recv_into(self._head[self._have : self._want])
        self._have += got
        return got

    def _went_on(self, now: float) -> bool:
        """What follows from the bytes that are here now; False: this is no sender."""
        if self.sink is None and self._have == self._want:
            head, self._have = self._head[: self._want], 0
            try:
                self._read(head, now)
            except direct.NotASender:
                return False
        if self.sink is not None and not self.sink.left:
            sink, self.sink = self.sink, None
            self._owner.finish(sink, now)
        return True

    def _read(self, head: memoryview, now: float) -> None:
        if not self.author:
            self.author = self._owner.admit(self, direct.read_greeting(head), now)
            self._want = direct.LENGTHS_BYTES
        elif self._payload_bytes < 0:
            self._want, self._payload_bytes = direct.read_lengths(head, self._owner.max_chunk_bytes)
        else:
            num_bytes, self._payload_bytes = self._payload_bytes, -1
            self._want = direct.LENGTHS_BYTES
            self.sink = self._owner.open(self, head, num_bytes, now)

    def _wait(self) -> None:
        left = self.sink.left if self.sink else 1
        wakes_at = left if left < 2 * _WAKE_BYTES else _WAKE_BYTES
        if wakes_at != self._wakes_at:
            self._wakes_at = wakes_at
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wakes_at)
