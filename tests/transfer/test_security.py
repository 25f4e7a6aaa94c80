"""`Authenticated` and `Full`: they carry KV; strangers cannot read what is encrypted, write, cancel or stall."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from lanewise.errors import ConfigError
from lanewise.request import Partner as Peer
from lanewise.transfer import Aborted, Committed, Delivered, LinkReport, mac
from lanewise.transfer import messages as m
from lanewise.transfer.keys import Security

MODES = ("Authenticated", "Full")


def write_keys(directory: Path, *names: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names or ("kv-server", "kv-client"):
        public, secret = zmq.curve_keypair()
        (directory / f"{name}.public").write_bytes(public)
        (directory / f"{name}.secret").write_bytes(secret)
    return directory


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "secret")


def move(net, prefill, decode, number: int = 0, have: int = 0) -> None:
    """One transfer, checked byte by byte."""
    key, ids = (f"r{number}", 1), list(range(number, number + 200))
    pages = prefill.compute(ids, number)
    decode.receiver.expect(key, ids, net.cache_key)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    prefill.sender.commit(key, net.token(key))
    end = prefill.log.wait((Delivered, Aborted), key)
    assert isinstance(end, Delivered), end
    decode.log.wait(Committed, key)
    assert np.array_equal(prefill.kv(pages, range(200)), decode.kv(key, range(200)))


@pytest.mark.parametrize("mode", MODES)
def test_kv_arrives(net, keys, mode):
    security = Security.of(mode, str(keys))
    prefill, decode = net.prefill(security=security), net.decode(security=security)
    decode.grant_all()
    for number in range(3):
        move(net, prefill, decode, number)
    assert decode.receiver.snapshot().forged == 0


@pytest.mark.parametrize(("here", "there"), [("None", "Full"), ("Full", "None"), ("None", "Authenticated")])
def test_different_encryption_never_pairs(net, keys, here, there):
    prefill = net.prefill(security=Security.of(here, str(keys)), timers=net.fast)
    decode = net.decode(security=Security.of(there, str(keys)), timers=net.fast)
    prefill.sender.connect(decode.peer)
    report = prefill.log.wait(LinkReport)
    assert report.link.state == "failed"


@pytest.mark.parametrize(("here", "there"), [("Authenticated", "Full"), ("Full", "Authenticated")])
def test_different_protection_of_data_is_refused_in_words(net, keys, here, there):
    prefill = net.prefill(security=Security.of(here, str(keys)))
    decode = net.decode(security=Security.of(there, str(keys)))
    prefill.sender.connect(decode.peer)
    assert f"encryption: {here} here" in prefill.log.wait(LinkReport).link.reason


@pytest.mark.parametrize("mode", MODES)
def test_a_client_with_another_key_gets_no_answer(net, keys, tmp_path, mode):
    strangers = write_keys(tmp_path / "other")
    (strangers / "kv-server.public").write_bytes((keys / "kv-server.public").read_bytes())
    decode = net.decode(security=Security.of(mode, str(keys)))
    stranger = net.prefill(security=Security.of(mode, str(strangers)), timers=net.fast)
    stranger.sender.connect(decode.peer)
    assert stranger.log.wait(LinkReport).link.state == "failed"
    net.eventually(lambda: decode.receiver.snapshot().refused_connections > 0, "the key is refused")


@pytest.mark.parametrize("mode", MODES)
def test_two_client_keys_are_accepted_during_rotation(net, keys, mode):
    decode = net.decode(security=Security.of(mode, str(keys)))
    decode.grant_all()
    old = net.prefill(security=Security.of(mode, str(keys)))
    move(net, old, decode, 0)
    write_keys(keys, "kv-client-next")  # in the folder of a running process
    fresh = keys.parent / "fresh"
    fresh.mkdir()
    for end in ("public", "secret"):
        (fresh / f"kv-server.{end}").write_bytes((keys / f"kv-server.{end}").read_bytes())
        (fresh / f"kv-client.{end}").write_bytes((keys / f"kv-client-next.{end}").read_bytes())
    new = net.prefill(security=Security.of(mode, str(fresh)))
    move(net, new, decode, 1)
    move(net, old, decode, 2)
    (keys / "kv-client-next.public").unlink()
    late = net.prefill(security=Security.of(mode, str(fresh)), timers=net.fast)
    late.sender.connect(decode.peer)
    assert late.log.wait(LinkReport).link.state == "failed"


def data_port(decode) -> int:
    return decode.receiver._thread._data_port


@contextlib.contextmanager
def dealer(address: str, **options) -> Iterator[zmq.Socket]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        for name, value in options.items():
            sock.setsockopt(getattr(zmq, name.upper()), value)
        sock.connect(address)
        yield sock


@pytest.mark.parametrize("mode", MODES)
def test_a_stranger_without_a_key_is_never_heard(net, keys, mode):
    """It greets, offers, writes, commits and cancels under the names of a live transfer: nothing of it counts."""
    security = Security.of(mode, str(keys))
    prefill, decode = net.prefill(security=security), net.decode(security=security)
    key, ids = ("live", 1), list(range(200))
    decode.grant_all()
    decode.receiver.expect(key, ids, net.cache_key)
    pages = prefill.compute(ids)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    prefill.sender.ready(key, 64)
    net.eventually(lambda: decode.receiver.snapshot().bytes_received > 0, "the transfer is under way")
    me, you = prefill.identity.incarnation, decode.identity.incarnation
    forged = [[m.encode(m.Abort(me, you, *key, "by a stranger"))], [m.encode(m.Ping(me, you, ()))]]
    addresses = [decode.address]
    if mode == "Authenticated":
        addresses.append(f"tcp://127.0.0.1:{data_port(decode)}")
    for address in addresses:
        for name in (f"{me}/c", f"{me}/d0", "stranger/c"):
            with dealer(address, routing_id=name.encode()) as sock:
                for frames in forged * 10:
                    with contextlib.suppress(zmq.Again):
                        sock.send_multipart(frames, zmq.NOBLOCK)
                assert sock.poll(100) == 0
    prefill.sender.commit(key, net.token(key))
    assert isinstance(prefill.log.wait((Delivered, Aborted), key), Delivered)
    assert np.array_equal(prefill.kv(pages, range(200)), decode.kv(key, range(200)))


def test_a_reader_of_the_wire_cannot_write_with_the_token_it_saw(net, keys):
    """`Authenticated` leaves the token of data connections readable: without the MAC key it opens nothing."""
    security = Security.of("Authenticated", str(keys))
    prefill, decode = net.prefill(security=security), net.decode(security=security)
    key, ids = ("live", 1), list(range(200))
    decode.grant_all()
    decode.receiver.expect(key, ids, net.cache_key)
    pages = prefill.compute(ids)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    prefill.sender.ready(key, 64)
    net.eventually(lambda: decode.receiver.snapshot().bytes_received > 0, "the transfer is under way")
    me, you = prefill.identity.incarnation, decode.identity.incarnation
    token = decode.receiver._thread._gate.token(me)
    payload = bytes(net.layout.slice_bytes(8, 1))
    where = (0, 1, 64, 72, 0, net.layout.num_kv_heads)
    chunk = m.Chunk(me, you, *key, 5, *where, m.checksum(payload), b"\0" * 16)
    own = mac.signed(msgspec.structs.replace(chunk, mac=b""), payload, mac.new_key())
    address = f"tcp://127.0.0.1:{data_port(decode)}"
    with dealer(address, plain_username=me.encode(), plain_password=token) as sock:
        for forged in (chunk, own):
            sock.send_multipart([m.encode(forged), payload])
        sock.send_multipart([m.encode(m.Abort(me, you, *key, "by a reader"))])
        net.eventually(lambda: decode.receiver.snapshot().forged == 2, "both forgeries are seen")
    prefill.sender.commit(key, net.token(key))
    assert isinstance(prefill.log.wait((Delivered, Aborted), key), Delivered)
    assert np.array_equal(prefill.kv(pages, range(200)), decode.kv(key, range(200)))


@pytest.mark.parametrize("mode", MODES)
def test_silent_strangers_are_capped_and_do_not_keep_others_out(net, keys, mode):
    security = Security.of(mode, str(keys))
    limits = net.limits(max_handshakes=8)
    decode = net.decode(security=security, limits=limits)
    decode.grant_all()
    port = int(decode.address.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(40)]

        def cut() -> int:
            return sum(is_closed(sock) for sock in silent)

        net.eventually(lambda: cut() >= 32, "all but eight are cut off", timeout=4.0)
        prefill = net.prefill(security=security)
        move(net, prefill, decode)
        net.eventually(lambda: cut() == 40, "the rest is dropped after 5 s", timeout=8.0)
        move(net, prefill, decode, 1)


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while data := sock.recv(4096):  # libzmq's greeting
            assert data
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


@pytest.mark.parametrize("mode", MODES)
def test_what_is_on_the_wire(net, keys, mode):
    """A tap between the two sides: `Full` shows neither KV nor names, and no control connection shows any of them."""
    security = Security.of(mode, str(keys))
    seen: list[bytes] = []
    decode = net.decode(security=security)
    decode.grant_all()
    port = int(decode.address.rpartition(":")[2])
    prefill = net.prefill(security=security)
    with tap(port, seen) as front:
        through = Peer(f"tcp://127.0.0.1:{front}", decode.identity.incarnation)
        key, ids = ("secret-name", 1), list(range(200))
        pages = prefill.compute(ids)
        decode.receiver.expect(key, ids, net.cache_key)
        prefill.sender.begin(key, through, ids, net.cache_key, pages)
        prefill.sender.commit(key, net.token(key))
        if mode == "Full":
            assert isinstance(prefill.log.wait((Delivered, Aborted), key), Delivered)
        else:
            prefill.log.wait((Delivered, Aborted), key)
    wire = b"".join(seen)
    kv = prefill.kv(pages, range(200)).tobytes()
    assert len(wire) > 500
    assert b"secret-name" not in wire
    assert kv[:64] not in wire


@contextlib.contextmanager
def tap(port: int, seen: list[bytes]) -> Iterator[int]:
    """A forwarder that keeps what passes."""
    stopping = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    threads: list[threading.Thread] = []
    sockets = [listener]

    def pump(source: socket.socket, sink: socket.socket) -> None:
        source.settimeout(0.1)
        while not stopping.is_set():
            try:
                data = source.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return
            if not data:
                return
            seen.append(data)
            with contextlib.suppress(OSError):
                sink.sendall(data)

    def serve() -> None:
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                sockets.extend((client, server))
                for pair in ((client, server), (server, client)):
                    threads.append(threading.Thread(target=pump, args=pair))
                    threads[-1].start()

    threads.append(threading.Thread(target=serve))
    threads[0].start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopping.set()
        for thread in list(threads):
            thread.join(5)
        for sock in sockets:
            sock.close()


def test_missing_and_bad_keys_are_named(tmp_path, keys):
    with pytest.raises(ConfigError, match="needs secret_dir"):
        Security.of("Full", "")
    with pytest.raises(ConfigError, match=r"kv-server\.public"):
        Security.of("Full", str(tmp_path / "nowhere"))
    (keys / "kv-client.secret").write_text("short")
    with pytest.raises(ConfigError, match=r"kv-client\.secret: expected a CURVE key"):
        Security.of("Authenticated", str(keys))
    assert not Security.of("None", "").on


def test_the_mac_covers_every_field_and_every_byte():
    key = mac.new_key()
    chunk = m.Chunk("p", "d", "r", 1, 0, 0, 1, 0, 8, 0, 2, b"\0" * 8)
    signed = mac.signed(chunk, b"payload", key)
    assert mac.genuine(signed, b"payload", key)
    assert not mac.genuine(signed, b"Payload", key)
    assert not mac.genuine(signed, b"payload", mac.new_key())
    assert not mac.genuine(signed, b"payload", b"")
    assert not mac.genuine(chunk, b"payload", key)
    for name in m.Chunk.__struct_fields__:
        value = getattr(signed, name)
        other = value + 1 if isinstance(value, int) else value[:-1] + type(value)(b"x" if type(value) is bytes else "x")
        assert not mac.genuine(msgspec.structs.replace(signed, **{name: other}), b"payload", key), name


def test_a_handshake_that_is_not_finished_is_dropped_after_5_s(net, keys):
    decode = net.decode(security=Security.of("Full", str(keys)))
    port = int(decode.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as silent:
        started = time.monotonic()
        net.eventually(lambda: is_closed(silent), "dropped", timeout=8.0)
        assert 3.0 < time.monotonic() - started < 7.0
