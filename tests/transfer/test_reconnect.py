"""Connections that break under a transfer: what was on its way is lost and sent again, under the same names."""

from __future__ import annotations

import contextlib
import socket
import threading

import numpy as np

from lanewise.transfer import Delivered, Limits, Peer

KEY, IDS = ("r", 1), list(range(400))


class Proxy:
    """Forwards TCP; `cut` closes every connection of the moment."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").split(":")
        self.target = (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.pairs: list[socket.socket] = []
        self.forwarded = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
                self.pairs += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self.forward, args=(source, sink), daemon=True).start()

    def forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(data)
                self.forwarded += len(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        pairs, self.pairs = self.pairs, []
        for sock in pairs:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def close(self) -> None:
        self.listener.close()
        self.cut()


def test_connections_cut_in_the_middle_of_a_transfer(net):
    prefill = net.prefill(timers=net.steady, limits=Limits(chunk_bytes=1024, stripes=2))
    decode = net.decode(timers=net.steady, limits=Limits(chunk_bytes=1024, max_chunk_bytes=4096, window_bytes=16384))
    decode.grant_all()
    proxy = Proxy(decode.address)
    try:
        decode.receiver.expect(KEY, IDS, net.cache_key)
        pages = prefill.compute(IDS)
        prefill.sender.begin(KEY, Peer(proxy.address, decode.identity.incarnation), IDS, net.cache_key, pages)
        for tokens in (100, 200, 300, 400):
            prefill.sender.ready(KEY, tokens)
            written = tokens * net.layout.bytes_per_token
            net.eventually(lambda written=written: decode.store.written >= written // 2, "half of it has arrived")
            proxy.cut()
        prefill.sender.commit(KEY, net.token(KEY))
        prefill.log.wait(Delivered, KEY, 15)
        assert np.array_equal(prefill.kv(pages, range(400)), decode.kv(KEY, range(400)))
        assert decode.store.written == 400 * net.layout.bytes_per_token, "a chunk was written twice"
    finally:
        proxy.close()
