"""Who may connect to a decode worker: CURVE keys, tokens of data connections, and strangers that say nothing.

Owns: the ZAP socket that libzmq asks, and the count of connections that have not proved who they are.
Must not: read messages of the channel. Its sockets belong to the transfer thread, like all others.
A connection that has not finished its handshake after 5 s is dropped by libzmq (HANDSHAKE_IVL); when more than
`max_handshakes` of them wait, the oldest is cut off here, so that silent strangers cannot keep others out. libzmq does
not say which connection has finished its handshake; the kernel says how much each has sent: as good a sign.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import struct

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from lanewise.errors import ConfigError
from lanewise.transfer.keys import Security
from lanewise.transfer.records import Counters

CONTROL_DOMAIN, DATA_DOMAIN = b"lanewise-control", b"lanewise-data"
_ZAP = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
_SAID_ENOUGH = {False: 300, True: 100}
"""Bytes a client has sent once it has shown its credentials: after ZMTP's greeting, its HELLO (CURVE's, or PLAIN's)."""
_TCP_INFO_BYTES, _BYTES_RECEIVED_AT = 136, 128


class Gate:
    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], security: Security, max_handshakes: int, counters: Counters
    ) -> None:
        """Before any server socket of the context is bound: libzmq looks for the ZAP socket at each handshake."""
        self._security = security
        self._max = max_handshakes
        self._counters = counters
        self._secret = secrets.token_bytes(32)
        self._pending: dict[
            int, tuple[socket.socket, int]
        ] = {}  # by descriptor: a duplicate, enough bytes; oldest first
        self._zap = context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        self._monitors: dict[zmq.Socket[bytes], int] = {}

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [self._zap, *self._monitors]

    def protect(self, sock: zmq.Socket[bytes], *, data: bool) -> None:
        """Makes a socket that will be bound ask for credentials: a key for control, a token for plain data."""
        sock.setsockopt(zmq.ZAP_DOMAIN, DATA_DOMAIN if data else CONTROL_DOMAIN)
        if data:
            sock.setsockopt(zmq.PLAIN_SERVER, 1)
        else:
            keys = self._security.server()
            sock.setsockopt(zmq.CURVE_SERVER, 1)
            sock.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            sock.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        monitor = sock.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        self._monitors[monitor] = _SAID_ENOUGH[data]

    def token(self, incarnation: str) -> bytes:
        """What a greeted sender shows when it opens its data connections; 64 characters."""
        return hmac.digest(self._secret, incarnation.encode(), hashlib.sha256).hex().encode()

    def on_readable(self, sock: zmq.Socket[bytes]) -> bool:
        """True where the socket is one of the gate's."""
        if sock is self._zap:
            self._answer()
        elif sock in self._monitors:
            self._observe(sock)
        else:
            return False
        return True

    def close(self) -> None:
        for copy, _ in self._pending.values():
            copy.close()
        self._pending.clear()

    def tick(self) -> None:
        """Forgets those that have shown who they are; a duplicate that is kept would keep a connection open."""
        for descriptor, (copy, enough) in list(self._pending.items()):
            if _received(copy) >= enough:
                self._forget(descriptor)

    def _answer(self) -> None:
        with contextlib.suppress(zmq.Again):
            frames = self._zap.recv_multipart(zmq.NOBLOCK)
            request_id = frames[1] if len(frames) > 1 else b""
            good = len(frames) >= 6 and frames[0] == _VERSION and self._admits(frames[2], frames[5], frames[6:])
            self._counters.refused_connections += not good
            status = (b"200", b"OK") if good else (b"400", b"no access")
            self._zap.send_multipart([_VERSION, request_id, *status, b"", b""], zmq.NOBLOCK)

    def _admits(self, domain: bytes, mechanism: bytes, credentials: list[bytes]) -> bool:
        if domain == CONTROL_DOMAIN and mechanism == b"CURVE" and len(credentials) == 1:
            try:
                return z85.encode(credentials[0]) in self._security.accepted()
            except ConfigError:  # the Secret is being replaced, or is gone: nobody new comes in
                return False
        if domain == DATA_DOMAIN and mechanism == b"PLAIN" and len(credentials) == 2:
            name = credentials[0].decode(errors="replace")
            return hmac.compare_digest(self.token(name), credentials[1])
        return False

    def _observe(self, monitor: zmq.Socket[bytes]) -> None:
        while True:
            try:
                event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            descriptor = int(event["value"])
            self._forget(descriptor)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._arrived(descriptor, self._monitors[monitor])

    def _arrived(self, descriptor: int, enough: int) -> None:
        with contextlib.suppress(OSError):  # gone already
            # The number may be used again; a duplicate stays this connection.
            self._pending[descriptor] = socket.socket(fileno=os.dup(descriptor)), enough
        if len(self._pending) > self._max:
            self.tick()
        while len(self._pending) > self._max:
            oldest = next(iter(self._pending))
            self._counters.refused_connections += 1
            with contextlib.suppress(OSError):
                self._pending[oldest][0].shutdown(socket.SHUT_RDWR)
            self._forget(oldest)

    def _forget(self, descriptor: int) -> None:
        if found := self._pending.pop(descriptor, None):
            found[0].close()


def _received(connection: socket.socket) -> int:
    """Bytes the other end has sent; 0 where the system does not say."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except (OSError, AttributeError):
        return 0
    return struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)[0] if len(info) == _TCP_INFO_BYTES else 0
