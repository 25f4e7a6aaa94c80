"""The sending ends of direct connections: chunks leave them straight from pages. See direct.py for the wire.

Owns: opening them, one per decode worker, writing them without waiting, and opening them again when they broke.
Must not: decide which chunk goes. Pages are read here after `send` has returned, so whoever ends a transfer calls
`release`: what is still to be written of it then becomes zeros, which no receiver takes for the chunk.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from lanewise.transfer import direct
from lanewise.transfer import messages as m
from lanewise.transfer.faults import Frames
from lanewise.transfer.records import Key

log = logging.getLogger("lanewise.transfer")

RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
_NEVER = float("inf")
_MAX_PARTS = 512  # of one system call; Linux takes 1024
_ZEROS = memoryview(bytes(1 << 20))
_IN, _OUT = int(zmq.POLLIN), int(zmq.POLLOUT)


@dataclass(slots=True)
class Letter:
    """A message on its way out: its head, then parts of pages (`lent`) or of the channel's own memory."""

    key: Key
    parts: Frames
    left: int  # bytes
    lent: bool = False
    on_sent: Callable[[], None] = lambda: None


class Outlet:
    def __init__(
        self,
        address: str,
        where: tuple[str, int, bytes],
        incarnation: str,
        watcher: direct.Watcher,
        on_broken: Callable[[str], None],
    ) -> None:
        """`where`: partner, port and token as HELLO_ACK names them."""
        self.where = where
        self.up = False
        self._address = address
        self._incarnation = incarnation
        self._watcher = watcher
        self._on_broken = on_broken
        self._sock: socket.socket | None = None
        self._greeted = False
        self._events = 0
        self._letters: deque[Letter] = deque()
        self._at = 0  # the part of the first letter that goes next
        self._tries = 0
        self._due_at = 0.0  # to be opened, or to be up at last

    @property
    def idle(self) -> bool:
        return self.up and not self._letters

    def tick(self, now: float) -> None:
        if now < self._due_at:
            return
        if self._sock is None:
            self._open(now)
        else:
            self._break("no answer", now)

    def send(self, letter: Letter, now: float) -> bool:
        """Takes a letter to be sent before all later ones; False: it did not go and its memory is free."""
        if not self.up:
            letter.on_sent()
            return False
        self._letters.append(letter)
        if len(self._letters) == 1:
            self._push(now)
        return self.up

    def release(self, key: Key) -> None:
        """From here on no page of this transfer is read."""
        for index, letter in enumerate(self._letters):
            if letter.lent and letter.key == key:
                first = max(1, self._at if index == 0 else 0)  # the head is no page, and says how long the rest is
                left = sum(map(len, letter.parts[first:]))
                whole, rest = divmod(left, len(_ZEROS))
                letter.parts[first:] = [*[_ZEROS] * whole, *([_ZEROS[:rest]] if rest else [])]
                letter.lent = False

    def close(self) -> None:
        self.up = self._greeted = False
        self._due_at = _NEVER
        if self._sock is not None:
            self._watcher.unwatch(self._sock)
            self._sock.close()
            self._sock = None
            self._events = 0
        while self._letters:
            self._letters.popleft().on_sent()
        self._at = 0

    def _open(self, now: float) -> None:
        _, port, _ = self.where
        if (place := direct.place(self._address, port)) is None:
            self._due_at = _NEVER
            return
        family, *target = place
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
        direct.prepare(sock)
        self._due_at = now + direct.SILENT_S
        sock.connect_ex(tuple(target))  # what comes of it is asked when it has
        self._wait(_OUT)

    def _on_ready(self, now: float) -> None:
        try:
            if self._letters:
                self._push(now)
            elif self._greeted:
                self._listen()
            else:
                self._greet()
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(str(error), now)

    def _greet(self) -> None:
        assert self._sock is not None
        if error := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        self._sock.send(direct.greeting(self._incarnation, self.where[2]))  # a new connection has room for it
        self._greeted = True
        self._wait(_IN)

    def _listen(self) -> None:
        assert self._sock is not None
        said = self._sock.recv(1)
        if said != direct.WELCOME or self.up:
            raise OSError("closed by the decode worker" if not said else "not a direct connection")
        self.up = True
        self._tries = 0
        self._due_at = _NEVER

    def _push(self, now: float) -> None:
        try:
            self._write()
        except BlockingIOError:
            self._wait(_OUT)
        except OSError as error:
            self._break(str(error), now)
        else:
            self._wait(_IN)

    def _write(self) -> None:
        assert self._sock is not None
        while self._letters:
            letter = self._letters[0]
            while letter.left:
                sent = self._sock.sendmsg(letter.parts[self._at : self._at + _MAX_PARTS])
                letter.left -= sent
                if letter.left:
                    self._skip(letter.parts, sent)
            self._at = 0
            self._letters.popleft().on_sent()

    def _skip(self, parts: Frames, sent: int) -> None:
        while sent >= len(parts[self._at]):
            sent -= len(parts[self._at])
            self._at += 1
        if sent:
            parts[self._at] = memoryview(parts[self._at])[sent:]

    def _wait(self, events: int) -> None:
        if events != self._events and self._sock is not None:
            self._events = events
            self._watcher.watch(self._sock, events, self._on_ready)

    def _break(self, reason: str, now: float) -> None:
        level = logging.WARNING if self._letters else logging.INFO  # a worker that goes is nothing to worry about
        log.log(level, "direct connection to %s: %s; ZeroMQ carries on", self._address, reason)
        self.close()
        self._due_at = now + min(RETRY_S * 2**self._tries, LONGEST_RETRY_S)
        self._tries = min(self._tries + 1, 10)
        self._on_broken(self._address)


class Outlets:
    def __init__(self, incarnation: str, watcher: direct.Watcher, on_broken: Callable[[str], None]) -> None:
        """`on_broken(address)`: what was sent there and not acknowledged may be lost."""
        self._incarnation = incarnation
        self._watcher = watcher
        self._on_broken = on_broken
        self._outlets: dict[str, Outlet] = {}  # by address

    def greeted(self, address: str, ack: m.HelloAck, now: float) -> None:
        """Opens a connection to a partner that has answered HELLO, where it takes any and has none of ours."""
        where = (ack.src, ack.direct_port, ack.direct_token)
        outlet = self._outlets.get(address)
        if (outlet and outlet.where == where) or ack.dst != self._incarnation:
            return
        self.forget(address)  # of an incarnation that was there before
        if ack.direct_port and not ack.refusal and len(ack.direct_token) == direct.TOKEN_BYTES:
            outlet = self._outlets[address] = Outlet(address, where, self._incarnation, self._watcher, self._on_broken)
            outlet.tick(now)

    def to(self, address: str) -> Outlet | None:
        """The connection to this address, where one is up."""
        outlet = self._outlets.get(address)
        return outlet if outlet and outlet.up else None

    def tick(self, now: float) -> None:
        for outlet in list(self._outlets.values()):
            outlet.tick(now)

    def release(self, key: Key) -> None:
        for outlet in self._outlets.values():
            outlet.release(key)

    def forget(self, address: str) -> None:
        """Nothing uses this address any more."""
        if outlet := self._outlets.pop(address, None):
            outlet.close()

    def close(self) -> None:
        for address in list(self._outlets):
            self.forget(address)
