"""Plain TCP connections that carry chunks from pages into pages, where nothing is encrypted: their wire form. Pure.

The sender shows a greeting with the token it was given in HELLO_ACK, hears one byte, and then writes messages: two
lengths, a header as in messages.py, the payload, or no payload where the header says where it lies in the sender's
memory. Nothing else comes back: answers go by ZeroMQ.
Owns: the layout of those bytes and what every such socket has set. Must not: read or write a connection.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

MAX_HEADER_BYTES = 20480  # with as many references as a message may have
TOKEN_BYTES = 32
WELCOME, WELCOME_READS = b"\x01", b"\x02"
"""What a receiver says; the second one when it can read the sender's memory."""
SILENT_S = 5.0
"""How long a connection may take to greet or to be welcomed."""

_MAGIC = b"lanewise"
_GREETING = struct.Struct("<8sB32s255siQ")
_LENGTHS = struct.Struct("<II")  # of header and payload
GREETING_BYTES, LENGTHS_BYTES = _GREETING.size, _LENGTHS.size


class NotASender(Exception):
    """Bytes that no sender says."""


class Watcher(Protocol):
    """The thread that waits on sockets."""

    def watch(self, sock: socket.socket, events: int, handler: Callable[[float], None]) -> None:
        """Calls the handler when one of the events may have happened; again with other events: those instead."""

    def unwatch(self, sock: socket.socket) -> None: ...


class Greeting(NamedTuple):
    """`pid` names the sender's process, where its memory may be read; at `address` it keeps the token."""

    incarnation: str
    token: bytes
    pid: int = 0
    address: int = 0


def greeting(says: Greeting) -> bytes:
    name = says.incarnation.encode()
    return _GREETING.pack(_MAGIC, len(name), says.token, name, says.pid, says.address)


def read_greeting(data: bytes | memoryview) -> Greeting:
    """Raises NotASender."""
    magic, length, token, name, pid, address = _GREETING.unpack(data)
    if magic != _MAGIC:
        raise NotASender("not a greeting")
    return Greeting(name[:length].decode(errors="replace"), token, pid, address)


def lengths(header_bytes: int, payload_bytes: int) -> bytes:
    return _LENGTHS.pack(header_bytes, payload_bytes)


def read_lengths(data: bytes | memoryview, max_payload_bytes: int) -> tuple[int, int]:
    """(bytes of the header, bytes of the payload); raises NotASender where no message has so many."""
    header_bytes, payload_bytes = _LENGTHS.unpack(data)
    if not 0 < header_bytes <= MAX_HEADER_BYTES or payload_bytes > max_payload_bytes:
        raise NotASender(f"a header of {header_bytes} bytes that announces {payload_bytes}")
    return header_bytes, payload_bytes


def prepare(sock: socket.socket) -> None:
    """Never waits, sends at once, notices a dead partner."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", 30), ("KEEPINTVL", 5), ("KEEPCNT", 3), ("USER_TIMEOUT", 10_000)):
        if option := getattr(socket, f"TCP_{name}", None):  # not everywhere
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def place(endpoint: str, port: int) -> tuple[socket.AddressFamily, str, int] | None:
    """Where "tcp://host:port" is with this port instead; None for a name, since looking it up could take long."""
    host = endpoint.rpartition("://")[2].rpartition(":")[0].strip("[]")
    host = {"*": "0.0.0.0", "localhost": "127.0.0.1"}.get(host, host)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except OSError:
        return None
    return found[0][0], host, port
