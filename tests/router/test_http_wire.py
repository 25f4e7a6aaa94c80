"""HTTP/1.1 at its edges, over real sockets: framing, pipelining, limits, refusals, closing, shutdown."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from lanewise.router import http_wire
from lanewise.router.http_exchange import Exchange
from lanewise.router.http_wire import HttpListener
from tests.router.scripted import until

DEADLINE_S = 10
LIMIT = 1000


class Echo:
    """A handler that answers with what it read, or as the path says."""

    def __init__(self) -> None:
        self.seen: list[Exchange] = []
        self.running = 0
        self.cancelled = 0
        self.release = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        self.seen.append(exchange)
        self.running += 1
        try:
            await self._answer(exchange)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.fault is not None:
            exchange.reply(exchange.fault.transport.http, exchange.fault.message.encode(), "text/plain")
        elif exchange.path == "/slow":
            await self.release.wait()
            exchange.reply(200, b"slow", "text/plain")
        elif exchange.path == "/stream":
            exchange.begin(200, "text/plain")
            for part in (b"one", b"two"):
                await exchange.write(part)
            await exchange.finish(b"three")
        elif exchange.path == "/endless":
            exchange.begin(200, "text/plain")
            while True:
                await exchange.write(b"x" * 65536)
        elif exchange.path == "/defect":
            raise ZeroDivisionError
        else:
            exchange.reply(200, exchange.method.encode() + b" " + bytes(exchange.body), "text/plain")


class Peer:
    def __init__(self, listener: HttpListener, echo: Echo, port: int) -> None:
        self.listener, self.echo, self.port = listener, echo, port

    async def ask(self, *sent: bytes, pause: bool = False) -> bytes:
        """All that comes back until the server closes, after `sent` on one connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(DEADLINE_S):
                for part in sent:
                    writer.write(part)
                    await writer.drain()
                    if pause:
                        await asyncio.sleep(0.01)
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def listening() -> AsyncIterator[Peer]:
    echo = Echo()
    listener = HttpListener(echo, LIMIT)
    port = await listener.start(socket.create_server(("127.0.0.1", 0)))
    try:
        yield Peer(listener, echo, port)
    finally:
        await listener.stop(1.0)


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with listening() as one:
        yield one


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("REQUEST_S", 0.2), ("KEEP_ALIVE_S", 0.2), ("LINGER_S", 0.2), ("SWEEP_S", 0.02)):
        monkeypatch.setattr(http_wire, name, seconds)


LAST = b"GET /last HTTP/1.1\r\nConnection: close\r\n\r\n"


async def test_keep_alive_and_pipelining_answer_in_order(peer: Peer) -> None:
    post = b"POST /p HTTP/1.1\r\nContent-Length: 2\r\n\r\n"
    answer = await peer.ask(post + b"aa" + post + b"bb" + post + b"cc" + LAST)
    assert [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 ")[1:]] == [
        *(b"POST aa", b"POST bb", b"POST cc", b"GET "),
    ]
    assert answer.count(b"connection: close") == 1


async def test_a_request_in_single_bytes(peer: Peer) -> None:
    whole = b"POST /p?q=1 HTTP/1.1\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
    answer = await peer.ask(*(whole[i : i + 1] for i in range(len(whole))))
    assert answer.endswith(b"\r\n\r\nPOST hello")
    assert peer.echo.seen[0].path == "/p"


async def test_chunked_bodies_both_ways(peer: Peer) -> None:
    head = b"POST /p HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert (await peer.ask(head, b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n", pause=True)).endswith(b"POST abcde")
    streamed = await peer.ask(b"GET /stream HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert streamed.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n")


async def test_http_1_0(peer: Peer) -> None:
    assert (await peer.ask(b"GET /x HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 200 OK\r\n")
    assert (await peer.ask(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")).endswith(b"\r\n\r\nonetwothree")


async def test_head_has_no_body_and_paths_are_decoded(peer: Peer) -> None:
    answer = await peer.ask(b"HEAD /a%20b HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert b"content-length: 5\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")
    assert peer.echo.seen[0].path == "/a b"
    await peer.ask(b"GET http://example.com/models?x HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert peer.echo.seen[1].path == "/models"


async def test_expect_continue(peer: Peer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
    writer.write(b"POST /p HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ok")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    writer.close()


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"nonsense\r\n\r\n", b"400", b"expected HTTP/1.1"),
        (b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n", b"400", b"CONNECT is not part"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * (6 * http_wire.MAX_HEAD_BYTES), b"400", b"headers are larger"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n", b"413", b"larger than 1000 bytes"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", b"400", b"expected HTTP/1.1"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400", b"expected HTTP/1.1"),
        (
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
            *(b"400", b"expected HTTP/1.1"),
        ),
        (
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"1f4\r\n"
            + b"z" * 500
            + b"\r\n"
            + b"1f5\r\n"
            + b"z" * 501,
            *(b"413", b"larger than 1000 bytes"),
        ),
    ],
)
@pytest.mark.usefixtures("quick")
async def test_what_cannot_be_served_is_refused_in_words_and_closed(sent: bytes, status: bytes, words: bytes) -> None:
    async with listening() as peer:
        answer = await peer.ask(b"GET /first HTTP/1.1\r\n\r\n" + sent)
        first, second = answer.split(b"HTTP/1.1 ")[1:]
        assert first.endswith(b"GET ")
        assert second.startswith(status)
        assert words in second
        assert b"connection: close" in second
        await until(lambda: not peer.listener.connections)


@pytest.mark.usefixtures("quick")
async def test_slow_requests_and_idle_connections_are_closed() -> None:
    async with listening() as peer:
        assert b"did not arrive" in await peer.ask(b"POST /p HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf")
        assert b"did not arrive" in await peer.ask(b"GET /p HT")
        assert await peer.ask() == b""
        assert (await peer.ask(b"GET /p HTTP/1.1\r\n\r\n")).endswith(b"GET ")


async def test_a_client_that_leaves_cancels_its_request(peer: Peer) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", peer.port)
    writer.write(b"GET /slow HTTP/1.1\r\n\r\n")
    await until(lambda: peer.echo.running)
    writer.close()
    await until(lambda: peer.echo.cancelled)
    assert not peer.listener.connections


async def test_a_stream_waits_for_its_reader_and_ends_with_it(peer: Peer) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", peer.port, limit=1024)
    writer.write(b"GET /endless HTTP/1.1\r\n\r\n")
    await until(lambda: any(one._may_write is not None for one in peer.listener.connections))
    (one,) = peer.listener.connections
    assert one.transport.get_write_buffer_size() < 1 << 20
    writer.transport.abort()
    await until(lambda: not peer.echo.running)


async def test_a_defect_ends_only_its_connection(peer: Peer) -> None:
    try:
        answer = await peer.ask(b"GET /defect HTTP/1.1\r\n\r\n")
    except ConnectionResetError:  # how an abort reads, where it does not read as an end
        answer = b""
    assert answer == b""
    assert b"200 OK" in await peer.ask(LAST)


async def test_an_upgrade_is_ignored(peer: Peer) -> None:
    upgrade = b"POST /p HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nhi"
    answer = await peer.ask(upgrade + LAST)
    assert answer.count(b" 200 OK") == 2
    assert b"POST hi" in answer


async def test_stop_lets_running_requests_end_and_closes_the_rest() -> None:
    async with listening() as peer:
        idle_reader, idle = await asyncio.open_connection("127.0.0.1", peer.port)
        slow = asyncio.create_task(peer.ask(b"GET /slow HTTP/1.1\r\n\r\n"))
        await until(lambda: peer.echo.running)
        stopping = asyncio.create_task(peer.listener.stop(DEADLINE_S))
        async with asyncio.timeout(DEADLINE_S):
            assert await idle_reader.read() == b""
            idle.close()
            peer.echo.release.set()
            assert b"connection: close" in await slow
            await stopping


async def test_stop_cuts_off_what_does_not_end() -> None:
    async with listening() as peer:
        slow = asyncio.create_task(peer.ask(b"GET /slow HTTP/1.1\r\n\r\n"))
        await until(lambda: peer.echo.running)
        started = time.monotonic()
        await peer.listener.stop(0.1)
        assert time.monotonic() - started < DEADLINE_S / 2
        await asyncio.wait({slow}, timeout=DEADLINE_S)
        assert slow.done()
        slow.exception()
        await until(lambda: peer.echo.cancelled)
