"""One HTTP/1.1 request and the answer to it.

Owns: the bytes of an answer (status line, headers, chunked body) and that exactly one is written.
Must not: parse (http_wire.py does, with httptools), or know what a request means.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import unquote

import httptools

from lanewise.errors import LanewiseError

if TYPE_CHECKING:
    from lanewise.router.http_wire import Connection

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Exchange:
    """What a handler reads and answers with: `reply` once, or `begin`, `write`..., `finish`.

    `fault` is set where the request could not be read as it should: it is answered and then the connection closes.
    """

    __slots__ = (
        "_chunked",
        "body",
        "connection",
        "fault",
        "headers",
        "http10",
        "keep_alive",
        "method",
        "status",
        "url",
    )

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.method = ""
        self.url = b""
        self.headers: dict[bytes, bytes] = {}  # names in lower case; the last of a name counts
        self.body: bytes | bytearray = b""
        self.fault: LanewiseError | None = None
        self.keep_alive = False
        self.http10 = False
        self.status = 0  # of the answer; 0 until its head is written
        self._chunked = False

    @property
    def path(self) -> str:
        """Decoded, without the query."""
        url = self.url
        if not url.startswith(b"/"):  # the absolute form, as through a proxy
            try:
                url = httptools.parse_url(url).path or b"/"
            except httptools.HttpParserInvalidURLError:
                return ""
        path = url.partition(b"?")[0].decode("latin-1")
        return unquote(path) if "%" in path else path

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    # ------------------------------------------------------------ the answer

    def reply(self, status: int, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> None:
        """The whole answer."""
        head = self._head(status, content_type, headers, b"content-length: %d\r\n" % len(body))
        self.connection.write(head if self.method == "HEAD" else head + body)

    def begin(self, status: int, content_type: str, headers: Mapping[str, str] | None = None) -> None:
        """The head of an answer of unknown length."""
        self._chunked = not self.http10
        self.keep_alive = self.keep_alive and self._chunked
        self.connection.write(
            self._head(status, content_type, headers, b"transfer-encoding: chunked\r\n" if self._chunked else b"")
        )

    async def write(self, data: bytes | bytearray) -> None:
        """A part of the body; waits while the client takes nothing. Raises ConnectionResetError when it is gone."""
        self.connection.write(b"%x\r\n%b\r\n" % (len(data), bytes(data)) if self._chunked else bytes(data))
        await self.connection.drained()

    async def finish(self, data: bytes | bytearray = b"") -> None:
        """The last part of the body and its end."""
        if self._chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), bytes(data)) if data else b"0\r\n\r\n"
        self.connection.write(bytes(data))
        await self.connection.drained()

    def abort(self) -> None:
        """Cut the client off: nothing more is read or written."""
        self.connection.abort()

    def _head(self, status: int, content_type: str, headers: Mapping[str, str] | None, framing: bytes) -> bytes:
        if self.status:
            raise RuntimeError(f"{self.method} {self.path} was answered with {self.status} already")
        self.status = status
        if self.connection.stopping:
            self.keep_alive = False
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]) if headers else ""
        return b"HTTP/1.%d %d %b\r\ncontent-type: %b\r\n%b%bdate: %b\r\n%b\r\n" % (
            0 if self.http10 else 1,
            status,
            _REASONS.get(status, b"Unknown"),
            content_type.encode(),
            framing,
            lines.encode("latin-1", "replace"),
            _date(),
            (b"connection: keep-alive\r\n" if self.http10 else b"") if self.keep_alive else b"connection: close\r\n",
        )


class _Clock:
    second = 0
    text = b""


def _date() -> bytes:
    """As RFC 9110 §6.6.1 asks for; made once a second."""
    now = int(time.time())
    if now != _Clock.second:
        _Clock.second, _Clock.text = now, formatdate(now, usegmt=True).encode()
    return _Clock.text
