"""Asks the cluster's DNS from outside, as a pod would from inside.

Owns: one kind of question. Must not: cache.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct

_A_RECORD = 1
_INTERNET = 1
_POINTER = 0xC0


def resolve(name: str, server: str, deadline_s: float = 2.0, attempts: int = 4) -> list[str]:
    """IPv4 addresses of a complete name, asked from `server`; empty when it has none. Raises OSError.

    A datagram may be lost, so a question without an answer is asked again, as a pod's resolver does (resolv.conf(5),
    `attempts`).
    """
    for _ in range(attempts - 1):
        with contextlib.suppress(TimeoutError):
            return _ask(name, server, deadline_s)
    return _ask(name, server, deadline_s)


def _ask(name: str, server: str, deadline_s: float) -> list[str]:
    ident = secrets.token_bytes(2)
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.rstrip(".").split("."))
    question = labels + b"\0" + struct.pack("!HH", _A_RECORD, _INTERNET)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.settimeout(deadline_s)
        connection.connect((server, 53))
        connection.send(ident + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + question)
        answer = connection.recv(4096)
    if answer[:2] != ident:
        raise OSError(f"{server} answered another question than {name}")
    (count,) = struct.unpack("!H", answer[6:8])
    return _addresses(answer, 12 + len(question), count)


def _addresses(answer: bytes, position: int, count: int) -> list[str]:
    found = []
    for _ in range(count):
        while answer[position] and answer[position] & _POINTER != _POINTER:
            position += answer[position] + 1
        position += 2 if answer[position] & _POINTER == _POINTER else 1
        kind, _, _, length = struct.unpack("!HHIH", answer[position : position + 10])
        position += 10
        if kind == _A_RECORD:
            found.append(socket.inet_ntoa(answer[position : position + length]))
        position += length
    return found
