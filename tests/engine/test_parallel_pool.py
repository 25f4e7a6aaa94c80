"""A pool whose heads lie in several ranks, against one that has them all; the ranks are threads here."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.engine import parallel_pool
from lanewise.engine.follower import serve_copies
from lanewise.engine.kv_pool import KVPool
from lanewise.engine.parallel_pool import ParallelPool
from lanewise.engine.pipe import Lost
from lanewise.policy.blocks import KVLayout

HEADS, PAGES = 4, 8
LAYOUT = KVLayout(num_layers=3, num_kv_heads=HEADS, head_dim=8, dtype="bfloat16", dtype_bytes=2)
CPU = torch.device("cpu")


@contextlib.contextmanager
def ranks(size: int) -> Iterator[tuple[ParallelPool, list[KVPool]]]:
    """Rank 0's pool, and those of the others, which serve it until the end."""
    own = replace(LAYOUT, num_kv_heads=HEADS // size)
    pairs = [socket.socketpair() for _ in range(size - 1)]
    others = [KVPool(own, PAGES, 16, CPU) for _ in pairs]

    def serve(sock: socket.socket, pool: KVPool) -> None:
        with contextlib.suppress(Lost):
            serve_copies(sock, pool)

    threads = [threading.Thread(target=serve, args=(pair[1], pool)) for pair, pool in zip(pairs, others, strict=True)]
    for thread in threads:
        thread.start()
    for pair in pairs:
        pair[0].settimeout(10)
    try:
        yield ParallelPool(own, LAYOUT, PAGES, 16, CPU, [pair[0] for pair in pairs]), others
    finally:
        for pair in pairs:
            pair[0].close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        for pair in pairs:
            pair[1].close()


def spans(size: int) -> st.SearchStrategy[range]:
    pair = st.tuples(st.integers(0, size), st.integers(0, size)).filter(lambda edges: edges[0] < edges[1])
    return pair.map(lambda edges: range(*edges))


@pytest.mark.parametrize("size", [1, 2, 4])
@settings(max_examples=60, deadline=None)
@given(tokens=spans(PAGES * 16), layers=spans(3), heads=spans(HEADS), order=st.permutations(range(PAGES)))
def test_any_range_of_heads_is_what_one_pool_would_give(size, tokens, layers, heads, order):
    here, there = list(order), list(reversed(order))
    with ranks(size) as (pool, others):
        alone, each = KVPool(LAYOUT, PAGES, 16, CPU), HEADS // size
        for index, layer in enumerate(alone.layers):
            layer.copy_(torch.randn(layer.shape))
            for rank, part in enumerate((pool, *others)):
                part.layers[index].copy_(layer[..., rank * each : (rank + 1) * each, :])
        assert pool.head_shards == size
        assert pool.layout == LAYOUT
        expected = alone.read(here, tokens, layers, heads)
        assert (pool.read(here, tokens, layers, heads) == expected).all()
        out = np.zeros_like(expected)
        assert pool.read(here, tokens, layers, heads, out) is out
        assert (out == expected).all()
        views = pool.views(here, tokens, layers, heads)
        assert views is None if heads != range(each) else b"".join(views) == expected.tobytes()
        for each_pool in (alone, pool):
            each_pool.write(there, tokens, layers, heads, memoryview(expected))
        whole = there, range(PAGES * 16), range(3), range(HEADS)
        assert (pool.read(*whole) == alone.read(*whole)).all(), "something else was written, or not all"


def test_only_the_ranks_whose_heads_are_wanted_are_asked(monkeypatch):
    """Bytes between ranks: none for rank 0's heads, and for others' no more than these."""
    asked: list[tuple[int, int]] = []  # rank and bytes

    with ranks(4) as (pool, _):
        sockets = {sock: rank for rank, sock in enumerate(pool._followers, 1)}
        monkeypatch.setattr(parallel_pool, "receive_into", spy(asked, sockets, parallel_pool.receive_into))
        monkeypatch.setattr(parallel_pool, "send", spy(asked, sockets, parallel_pool.send))

        def moved(action, *arguments) -> dict[int, int]:
            asked.clear()
            action([3, 1], range(20), range(2), *arguments)
            by_rank: dict[int, int] = {}
            for rank, num_bytes in asked:
                by_rank[rank] = by_rank.get(rank, 0) + (num_bytes if num_bytes > QUESTION_BYTES else 0)
            return by_rank

        head = 2 * 2 * 20 * 8 * 2  # bytes of one
        for low, high in ((0, 1), (1, 2), (3, 4), (0, 2), (1, 3), (0, 4)):
            expected = dict.fromkeys(range(max(low, 1), high), head)
            assert moved(pool.read, range(low, high)) == expected
            assert moved(pool.write, range(low, high), bytes(head * (high - low))) == expected


QUESTION_BYTES = 100


def spy(asked, sockets, real):
    def counted(sock, data):
        asked.append((sockets[sock], len(data)))
        return real(sock, data)

    return counted


def test_what_cannot_be_asked_is_refused_before_any_rank_hears_of_it():
    with ranks(2) as (pool, _):
        for tokens, heads in ((range(40), range(4)), (range(3), range(5)), (range(3), range(2, 2))):
            with pytest.raises(ValueError, match="does not lie in"):
                pool.read([0, 1], tokens, range(1), heads)
            with pytest.raises(ValueError, match="does not lie in"):
                pool.write([0, 1], tokens, range(1), heads, bytes(2 * len(tokens) * len(heads) * 16))
        pool.write([0, 1], range(3), range(1), range(4), b"\7" * 2 * 3 * 64)
        assert (pool.read([0, 1], range(3), range(1), range(4)) == 7).all()


def test_half_an_answer_is_never_taken_for_the_next(monkeypatch):
    """When a rank does not answer in time the conversation with it is over, though it may answer later."""
    with ranks(2) as (pool, _):
        real = parallel_pool.receive_into

        def late(*_: object) -> None:
            raise Lost("a rank does not answer")

        monkeypatch.setattr(parallel_pool, "receive_into", late)
        with pytest.raises(Lost, match="does not answer"):
            pool.read([0], range(3), range(1), range(4))
        monkeypatch.setattr(parallel_pool, "receive_into", real)
        with pytest.raises(Lost):
            pool.read([0], range(3), range(1), range(4))
