"""The KV pool of a tensor-parallel worker: pages are kept by rank 0, each rank holds the KV of its own heads.

Owns: joining and splitting heads between the canonical wire form and the ranks. Must not: allocate on other ranks.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence as Seq

import msgspec
import numpy as np
import torch

from lanewise.engine.kv_pool import Bytes, KVPool
from lanewise.engine.pipe import Copy, receive, send
from lanewise.policy.blocks import KVLayout


class ParallelPool(KVPool):
    """`layers` holds rank 0's heads; `layout` and the wire are of all heads. `followers` serve ranks 1, 2 and so on."""

    def __init__(
        self,
        own: KVLayout,
        whole: KVLayout,
        num_pages: int,
        page_tokens: int,
        device: torch.device,
        followers: Seq[socket.socket],
    ) -> None:
        super().__init__(own, num_pages, page_tokens, device)
        self._own_layout, self.layout = own, whole
        self._followers = followers
        self._lock = threading.Lock()  # one question at a time on each socket

    def read(self, pages: Seq[int], tokens: range, layers: range, out: Bytes | None = None) -> Bytes:
        num_bytes = self._own_layout.slice_bytes(len(tokens), len(layers))
        own = np.empty(num_bytes, dtype=np.uint8)
        with self._lock:
            self._ask(Copy(False, *_place(pages, tokens, layers)))
            super().read(pages, tokens, layers, own)
            others = [np.frombuffer(receive(sock), dtype=np.uint8) for sock in self._followers]
        if out is None:
            out = np.empty(num_bytes * (1 + len(others)), dtype=np.uint8)
        whole = out.reshape(-1, 1 + len(others), self._row_bytes)  # [layer, K|V and token, rank, its heads]
        for rank, part in enumerate((own, *others)):
            whole[:, rank] = part.reshape(-1, self._row_bytes)
        return out

    def write(self, pages: Seq[int], tokens: range, layers: range, data: memoryview | bytes | Bytes) -> None:
        whole = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + len(self._followers), self._row_bytes)
        parts = [np.ascontiguousarray(whole[:, rank]) for rank in range(whole.shape[1])]
        with self._lock:
            self._ask(Copy(True, *_place(pages, tokens, layers)))
            for sock, part in zip(self._followers, parts[1:], strict=True):
                send(sock, part.reshape(-1).data)
            super().write(pages, tokens, layers, parts[0].reshape(-1))
            for sock in self._followers:
                receive(sock)  # written

    def views(self, pages: Seq[int], tokens: range, layers: range) -> None:
        """None: heads of several ranks lie side by side on the wire."""

    def _ask(self, question: Copy) -> None:
        data = msgspec.msgpack.encode(question)
        for sock in self._followers:
            send(sock, data)


def _place(pages: Seq[int], tokens: range, layers: range) -> tuple[bytes, tuple[int, int], tuple[int, int]]:
    return np.asarray(pages, dtype=np.int32).tobytes(), (tokens.start, tokens.stop), (layers.start, layers.stop)
