"""The KV pool of a tensor-parallel worker: pages are kept by rank 0, each rank holds the KV of its own heads.

Owns: which rank is asked for which heads, and how they lie together on the wire. Must not: allocate on other ranks, or
ask a rank none of whose heads are wanted.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from lanewise.engine.kv_pool import Bytes, KVPool
from lanewise.engine.pipe import Copy, receive, receive_into, send
from lanewise.policy.blocks import KVLayout


@dataclass(frozen=True, slots=True)
class _Share:
    """What of a range of heads one rank holds."""

    rank: int
    heads: range  # as this rank counts them
    within: slice  # their bytes, where a token has the whole range


class ParallelPool(KVPool):
    """`layers` holds rank 0's heads; `layout` and the wire are of all heads. `followers` serve ranks 1, 2 and so on.

    `views` gives rank 0's heads, which lie here, as long as no others are asked for."""

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
        self.layout = whole
        self.head_shards = 1 + len(followers)
        self._followers = followers
        self._lock = threading.Lock()  # one question at a time on each socket

    def read(self, pages: Seq[int], tokens: range, layers: range, heads: range, out: Bytes | None = None) -> Bytes:
        shares = self._shares(heads)
        rows = len(layers) * 2 * len(tokens)
        if out is None:
            out = np.empty(rows * len(heads) * self._head_bytes, dtype=np.uint8)
        if len(shares) == 1:
            self._read_shares(pages, tokens, layers, shares, [out])
            return out
        parts = [np.empty(rows * len(share.heads) * self._head_bytes, dtype=np.uint8) for share in shares]
        self._read_shares(pages, tokens, layers, shares, parts)
        whole = out.reshape(rows, -1)
        for share, part in zip(shares, parts, strict=True):
            whole[:, share.within] = part.reshape(rows, -1)
        return out

    def _read_shares(
        self, pages: Seq[int], tokens: range, layers: range, shares: list[_Share], into: Seq[Bytes]
    ) -> None:
        """Each rank's part into its array; the ranks read at the same time."""
        with self._talk(pages, tokens):
            for share in shares:
                if share.rank:
                    self._ask(share, False, pages, tokens, layers)
            for share, part in zip(shares, into, strict=True):
                if share.rank:
                    receive_into(self._followers[share.rank - 1], part.reshape(-1).data)
                else:
                    super().read(pages, tokens, layers, share.heads, part)

    def write(
        self, pages: Seq[int], tokens: range, layers: range, heads: range, data: memoryview | bytes | Bytes
    ) -> None:
        shares = self._shares(heads)
        whole = np.frombuffer(data, dtype=np.uint8).reshape(len(layers) * 2 * len(tokens), -1)
        others = [share for share in shares if share.rank]
        with self._talk(pages, tokens):
            for share in others:
                self._ask(share, True, pages, tokens, layers)
                part = np.ascontiguousarray(whole[:, share.within])  # a copy only where heads of others lie between
                send(self._followers[share.rank - 1], part.reshape(-1).data)
            if not shares[0].rank:
                own = np.ascontiguousarray(whole[:, shares[0].within])
                super().write(pages, tokens, layers, shares[0].heads, own)
            for share in others:
                receive(self._followers[share.rank - 1])  # written

    @contextlib.contextmanager
    def _talk(self, pages: Seq[int], tokens: range) -> Iterator[None]:
        """One question and its answers. What breaks off in between ends the ranks, and so the worker: the rest of an
        answer would be taken for the next one. So what cannot be asked is found out before."""
        self._runs(pages, tokens)
        with self._lock:
            try:
                yield
            except BaseException:
                for sock in self._followers:
                    with contextlib.suppress(OSError):  # it has ended already
                        sock.shutdown(socket.SHUT_RDWR)
                raise

    def _shares(self, heads: range) -> list[_Share]:
        """By rank. A range that is empty or not of this model's heads: ValueError."""
        each = len(self._heads)
        if heads.step != 1 or not 0 <= heads.start < heads.stop <= each * self.head_shards:
            raise ValueError(f"{heads} does not lie in {each * self.head_shards} heads")
        shares = []
        for rank in range(heads.start // each, -(-heads.stop // each)):
            first = rank * each
            low, high = max(heads.start, first), min(heads.stop, first + each)
            within = slice((low - heads.start) * self._head_bytes, (high - heads.start) * self._head_bytes)
            shares.append(_Share(rank, range(low - first, high - first), within))
        return shares

    def _ask(self, share: _Share, write: bool, pages: Seq[int], tokens: range, layers: range) -> None:
        place = np.asarray(pages, dtype=np.int32).tobytes()
        ranges = [(part.start, part.stop) for part in (tokens, layers, share.heads)]
        send(self._followers[share.rank - 1], msgspec.msgpack.encode(Copy(write, place, *ranges)))
