"""HTTP/1.1 connections: bytes in, one Exchange at a time to the handler, limits and time limits.

Parsing is llhttp's (httptools). It is not aiohttp's server because a request passes ours in a third of the time when
the caches are cold, which between two steps of a model they are (docs/measured.md).
Owns: keep-alive, pipelining, size and time limits, closing. Must not: know paths, JSON or errors beyond naming them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

import httptools
import structlog

from lanewise.errors import ErrorCode, LanewiseError, invalid
from lanewise.router.http_exchange import Exchange

MAX_HEAD_BYTES = 64 * 1024
MAX_WAITING = 1  # pipelined requests that wait for their turn before reading stops
REQUEST_S = 60.0  # a request that has not arrived by then is given up
KEEP_ALIVE_S = 75.0  # longer than the 60 s after which proxies commonly drop an idle connection
LINGER_S = 5.0  # a refused client that still sends is listened to for this long, or it might not see the answer
SWEEP_S = 1.0
BACKLOG = 1024

Handler = Callable[[Exchange], Awaitable[None]]

log = structlog.get_logger(__name__)


class HttpListener:
    """Accepts connections on one socket."""

    def __init__(self, handler: Handler, max_body_bytes: int) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self.connections: set[Connection] = set()
        self.draining = False
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> int:
        """Returns the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), sock=listener, backlog=BACKLOG, ssl=tls)
        self._sweeper = loop.create_task(self._sweep())
        port: int = listener.getsockname()[1]
        return port

    def drain(self) -> None:
        """Send clients elsewhere: idle connections close, every answer is the last of its connection."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()

    async def stop(self, timeout_s: float) -> None:
        """Take no more; running requests have `timeout_s` to end, then they are cut off."""
        if self._server is not None:
            self._server.close()
        self.drain()
        if running := [connection.closed for connection in self.connections]:
            await asyncio.wait(running, timeout=timeout_s)
        for connection in list(self.connections):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    async def _sweep(self) -> None:
        """Time limits are looked at once a second for all: a timer for each request would cost every request."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.check_time(now)


class Connection(asyncio.Protocol):
    def __init__(self, listener: HttpListener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._reading: Exchange | None = None  # the request that arrives now
        self._upgrade: Exchange | None = None  # a request that asked for another protocol
        self._head_done = False
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._waiting: deque[Exchange] = deque()
        self._task: asyncio.Task[None] | None = None
        self._deaf = False  # a fault was found: what still arrives is thrown away
        self._since = time.monotonic()  # of the present state: idle, receiving or lingering
        self._may_write: asyncio.Future[None] | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # ------------------------------------------------------------ from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class
        # A token's bytes leave at once. asyncio sees to this only where it made the socket itself.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(invalid(f"expected HTTP/1.1: {error}"))
        else:
            if not self._head_done and self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(invalid(f"the headers are larger than {MAX_HEAD_BYTES} bytes"))

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.connections.discard(self)
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
        self.resume_writing()
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        self._may_write = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._may_write is not None and not self._may_write.done():
            self._may_write.set_result(None)
        self._may_write = None

    # ------------------------------------------------------------ from the parser

    def on_message_begin(self) -> None:
        self._reading = Exchange(self)
        self._since = time.monotonic()
        self._body = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        if self._reading is not None:
            self._reading.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading is not None:
            self._reading.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        exchange = self._reading
        if exchange is None:
            return
        self._head_done = True
        exchange.method = self._parser.get_method().decode()
        exchange.http10 = self._parser.get_http_version() == "1.0"
        exchange.keep_alive = self._parser.should_keep_alive()
        if exchange.method == "CONNECT":
            self._refuse(invalid("CONNECT is not part of this API"))
            return
        if self._parser.should_upgrade():
            self._upgrade, self._reading = exchange, None
            return
        length = exchange.headers.get(b"content-length")
        if length is not None and int(length) > self._listener.max_body_bytes:  # llhttp has checked the digits
            self._refuse(self._too_large())
        elif b"expect" in exchange.headers and self._task is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """As a server may (RFC 9110 §7.8). llhttp leaves the body unread, so it reads the request anew without it."""
        exchange, self._upgrade = self._upgrade, None
        if exchange is not None:
            fields = b"".join([b"%b: %b\r\n" % item for item in exchange.headers.items() if item[0] != b"upgrade"])
            self._parser = httptools.HttpRequestParser(self)
            self.data_received(b"%b %b HTTP/1.1\r\n%b\r\n%b" % (exchange.method.encode(), exchange.url, fields, rest))

    def on_body(self, body: bytes) -> None:
        if self._reading is None:
            return
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > self._listener.max_body_bytes:
            self._refuse(self._too_large())

    def on_message_complete(self) -> None:
        exchange, self._reading = self._reading, None
        self._head_done, self._head_bytes = False, 0
        if exchange is None:  # refused before its end
            return
        body = self._body
        exchange.body = body[0] if len(body) == 1 else b"".join(body)
        self._body = []
        self._enqueue(exchange)

    # ------------------------------------------------------------ from the exchange

    def write(self, data: bytes) -> None:
        if self.transport.is_closing():
            raise ConnectionResetError("the client is gone")
        self.transport.write(data)

    async def drained(self) -> None:
        if self._may_write is not None:
            await asyncio.shield(self._may_write)
        if self.transport.is_closing():
            raise ConnectionResetError("the client is gone")

    @property
    def stopping(self) -> bool:
        return self._listener.draining

    def abort(self) -> None:
        self.transport.abort()

    # ------------------------------------------------------------ one after the other

    def close_if_idle(self) -> None:
        """For shutdown: a request that runs, or waits its turn, is answered first."""
        if self._task is None and not self.transport.is_closing():
            self.transport.close()

    def check_time(self, now: float) -> None:
        """Called once a second."""
        waited = now - self._since
        if self._task is not None:
            return  # requests have time limits of their own
        if self._deaf:
            if waited > LINGER_S:
                self.abort()
        elif self._reading is not None or self._head_bytes:
            if waited > REQUEST_S:
                self._refuse(invalid(f"the request did not arrive within {REQUEST_S:g} s"))
        elif waited > KEEP_ALIVE_S:
            if self.transport.get_write_buffer_size():
                self.abort()  # it takes nothing, so close() would wait for it for ever
            else:
                self.transport.close()

    def _too_large(self) -> LanewiseError:
        limit = self._listener.max_body_bytes
        return LanewiseError(ErrorCode.PAYLOAD_TOO_LARGE, f"the body is larger than {limit} bytes")

    def _refuse(self, fault: LanewiseError) -> None:
        """What arrives now cannot be served: answered in its turn, then the connection closes."""
        if self._deaf:
            return
        self._deaf = True
        exchange, self._reading = self._reading or Exchange(self), None
        self._body = []
        exchange.fault, exchange.keep_alive = fault, False
        self._enqueue(exchange)

    def _enqueue(self, exchange: Exchange) -> None:
        if self._task is None:
            self._start(exchange)
            return
        self._waiting.append(exchange)
        if len(self._waiting) >= MAX_WAITING:
            self.transport.pause_reading()

    def _start(self, exchange: Exchange) -> None:
        self._task = self._loop.create_task(self._serve(exchange))

    async def _serve(self, exchange: Exchange) -> None:
        try:
            await self._listener.handler(exchange)
        except ConnectionError:
            pass  # the client went away while it was written to
        except Exception:  # handlers answer their own failures: this is a defect of one
            log.exception("http_defect", method=exchange.method, path=exchange.path)
            self.abort()
        finally:
            self._task = None
        self._after(exchange)

    def _after(self, exchange: Exchange) -> None:
        if self.transport.is_closing():
            return
        self._since = time.monotonic()
        if not exchange.keep_alive or self.stopping:
            self._waiting.clear()
            if self._deaf and self.transport.can_write_eof():
                self.transport.write_eof()  # the client may still send; check_time ends it
            else:
                self.transport.close()
        elif self._waiting:
            self._start(self._waiting.popleft())
            if len(self._waiting) < MAX_WAITING:
                self.transport.resume_reading()
