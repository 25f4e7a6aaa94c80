"""The sending end of one direct connection: chunks leave it straight from pages. See direct.py for the wire.

Owns: opening it, finding out which way is fastest (trial.py), writing without waiting, and opening it again when it
broke. Must not: decide which chunk goes. Pages are read here after `send` has returned, so whoever ends a transfer
calls `release`: what is still to be written of it then becomes zeros, which no receiver takes for the chunk.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Protocol

import zmq

from lanewise.transfer import direct, ipc_link, neighbour
from lanewise.transfer import messages as m
from lanewise.transfer.faults import Frames
from lanewise.transfer.ipc_link import Device
from lanewise.transfer.letters import Letter, Letters
from lanewise.transfer.records import Key, Limits
from lanewise.transfer.trial import References, Route, Trial

log = logging.getLogger("lanewise.transfer")

RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
TRIAL_AFTER_S = 0.2  # a link that comes up measures its own sockets first
_NEVER = float("inf")
_MOST_LETTERS = 64  # that wait to leave together
_IN, _OUT = int(zmq.POLLIN), int(zmq.POLLOUT)


class Owner(direct.Watcher, Protocol):
    limits: Limits

    def broken(self, address: str) -> None:
        """What was sent there and not acknowledged may be lost."""

    def probe_sockets(self, address: str, frames: Frames) -> None:
        """Sends a test block beside the direct connection, by ZeroMQ."""

    def measured(self, address: str, partner: str, num_bytes: int, seconds: float) -> None:
        """So long takes a block to this partner by the way that is taken."""

    def impossible(self, address: str, reason: str) -> None:
        """The way that was demanded does not exist."""


class Outlet:
    def __init__(
        self,
        address: str,
        where: tuple[str, int, bytes],
        incarnation: str,
        owner: Owner,
        references: References,
        block_bytes: int,
        device: Device | None = None,
    ) -> None:
        """`where`: partner, port and token as HELLO_ACK names them; `block_bytes`: of a test block. `device`: in whose
        memory the chunks lie that may be referred to."""
        self.where = where
        self.up = False
        self.route = Route.BYTES
        self._address = address
        self._incarnation = incarnation
        self._owner = owner
        self._references = references
        self._block_bytes = block_bytes
        self._device = device
        # What we are known by to who reads our memory, and what of a GPU's it may read.
        self._token = bytearray(where[2] + ipc_link.card(device))
        self._sock: socket.socket | None = None
        self._greeted = False
        self._trial: Trial | None = None
        self._events = 0
        self._letters = Letters()
        self._tries = 0
        self._due_at = 0.0  # to be opened, or to be up at last

    @property
    def idle(self) -> bool:
        return self.up and not self._letters

    @property
    def takes_more(self) -> bool:
        """Of messages without a payload, which leave together."""
        return self.up and not self._blocked and len(self._letters) < _MOST_LETTERS

    def tick(self, now: float) -> None:
        if now < self._due_at:
            return
        if self._sock is None:
            self._open(now)
        elif self._trial:
            self._test(self._trial, now)
        else:
            self._break("no answer", now)

    def send(self, letter: Letter, now: float, *, later: bool = False) -> bool:
        """Takes a letter to be sent before all later ones; False: it did not go and its memory is free. `later`: with
        what comes until `flush`, by one system call."""
        if not self.up:
            letter.on_sent()
            return False
        if later:
            self._letters.add(letter)
            return True
        self._post(letter, now)
        return self.up

    def flush(self, now: float) -> None:
        """Sends what waits for more."""
        if self._letters and not self._blocked:
            self._push(now)

    def _post(self, letter: Letter, now: float) -> None:
        self._letters.add(letter)
        self.flush(now)

    def release(self, key: Key) -> None:
        """From here on no page of this transfer is read."""
        self._letters.release(key)

    def close(self) -> None:
        self.up = self._greeted = False
        self._trial, self.route = None, Route.BYTES
        self._due_at = _NEVER
        if self._sock is not None:
            self._owner.unwatch(self._sock)
            self._sock.close()
            self._sock = None
            self._events = 0
        self._letters.clear()

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
                self._listen(now)
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
        says = direct.Greeting(self._incarnation, self.where[2])
        if self._references is not References.NEVER:
            says = says._replace(pid=os.getpid(), address=neighbour.address_of(self._token))
        self._sock.send(direct.greeting(says))  # a new connection has room for it
        self._greeted = True
        self._wait(_IN)

    def _listen(self, now: float) -> None:
        assert self._sock is not None
        said = self._sock.recv(1)
        if said not in (direct.WELCOME, direct.WELCOME_READS) or self.up:
            raise OSError("closed by the decode worker" if not said else "not a direct connection")
        reads, demanded = said == direct.WELCOME_READS, self._references is References.ALWAYS
        if demanded and not reads:
            self.close()
            self._owner.impossible(self._address, "the decode worker cannot read this process's memory")
            return
        others = () if demanded else (Route.BYTES, Route.ZEROMQ)
        routes = (*others, *((Route.REFERENCE,) if reads else ()))
        self._trial = Trial(self._incarnation, self.where[0], self._block_bytes, routes)
        if self._device:
            self._trial.refer = ipc_link.refer_to(self._device)
        self.up, self._tries, self._due_at = True, 0, now + TRIAL_AFTER_S

    def _test(self, trial: Trial, now: float) -> None:
        """The next test block; behind the last one, the way is chosen. Until then bytes go by the connection."""
        if found := trial.next(now):
            probe, block = found
            header, num_bytes = m.encode(probe), len(block) if block else 0
            parts: Frames = [direct.lengths(len(header), num_bytes) + header, *([block] if block else [])]
            self._due_at = trial.due_at
            if block and trial.route is Route.ZEROMQ:
                self._owner.probe_sockets(self._address, [header, block])
                return
            self._post(Letter(("", 0), parts, len(parts[0]) + num_bytes), now)
            return
        route = trial.best()
        self._trial, self._due_at = None, _NEVER
        if route is None:  # as long as chunks are acknowledged bytes will do, but not where references are demanded
            if self._references is References.ALWAYS:
                self._break("no answer to test blocks", now)
            return
        self.route = route
        log.info("KV to %s goes by %s; test blocks: %s", self._address, route, trial)
        self._owner.measured(self._address, self.where[0], trial.num_bytes, trial.seconds[route])

    def proved(self, ack: m.ProbeAck, now: float) -> None:
        """A test block was answered, perhaps one of this connection."""
        if self._trial and ack.src == self.where[0] and self._trial.heard(ack, now):
            self._test(self._trial, now)

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
            self._letters.sent(self._sock.sendmsg(self._letters.next_parts()))

    @property
    def _blocked(self) -> bool:
        return self._events == _OUT

    def _wait(self, events: int) -> None:
        if events != self._events and self._sock is not None:
            self._events = events
            self._owner.watch(self._sock, events, self._on_ready)

    def _break(self, reason: str, now: float) -> None:
        level = logging.WARNING if self._letters else logging.INFO  # a worker that goes is nothing to worry about
        log.log(level, "direct connection to %s: %s; ZeroMQ carries on", self._address, reason)
        self.close()
        self._due_at = now + min(RETRY_S * 2**self._tries, LONGEST_RETRY_S)
        self._tries = min(self._tries + 1, 10)
        self._owner.broken(self._address)
