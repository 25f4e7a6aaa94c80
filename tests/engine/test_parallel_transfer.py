"""KV between engines of one rank and of two, through the real channel: chunks of one rank's heads, the same text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanewise.engine import parallel_pool
from lanewise.engine.runner import Engine, Work
from lanewise.engine.sequence import Sequence
from lanewise.request import Sampling, Token
from lanewise.transfer import Committed, Delivered, Endpoint, Limits, Offered, Peer, Receiver, Sender
from lanewise.transfer import messages as m
from lanewise.transfer.chunks import Slice, covers
from lanewise.transfer.encoding import Encoding, wire_layout
from lanewise.transfer.receiver_core import ReceiverCore
from tests.transfer.conftest import Log, eventually

GREEDY = Sampling(max_tokens=24, temperature=0.0)
CACHE_KEY = b"k" * 32
PROMPT = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(3)).tolist()
LIMITS = Limits(chunk_bytes=16_384, least_piece_bytes=1)


class Channel:
    """A sender of one pool and a receiver into another, and every chunk that came."""

    def __init__(self, source: Engine, target: Engine, direct: bool, encoding: str, chunks: list[m.Chunk]) -> None:
        self.chunks = chunks
        self.sent, self.received = Log(), Log()
        here, there = (
            Endpoint(name, engine.fingerprint, engine.fingerprint_fields, wire_layout(engine.pool.layout, encoding))
            for name, engine in (("prefill", source), ("decode", target))
        )
        self.receiver = Receiver(there, target.pool, self.received, limits=LIMITS, direct=direct)
        self.peer = Peer(self.receiver.start(), "decode")
        self.sender = Sender(here, source.pool, self.sent, limits=LIMITS, direct=direct)
        self.sender.start()
        self.sender.connect(self.peer)
        if direct:
            outlets = self.sender._thread._ways.outlets
            eventually(lambda: outlets.to(self.peer.kv_address) is not None, "a direct connection")

    def close(self) -> None:
        self.sender.close(1.0)
        self.receiver.close(1.0)
        for side in (self.sender, self.receiver):
            assert side.snapshot().internal_errors == 0


@contextmanager
def channel(
    source: Engine, target: Engine, direct: bool, monkeypatch: pytest.MonkeyPatch, encoding: str = "Native"
) -> Iterator[Channel]:
    chunks: list[m.Chunk] = []
    real = ReceiverCore.receive

    def receive(core: ReceiverCore, message: m.AnyMessage, *rest: Any) -> Any:
        if isinstance(message, m.Chunk):
            chunks.append(message)
        return real(core, message, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ReceiverCore, "receive", receive)
        open_channel = Channel(source, target, direct, encoding, chunks)
        try:
            yield open_channel
        finally:
            open_channel.close()


def carried(source: Engine, target: Engine, over: Channel, driver: Any) -> tuple[Sequence, Sequence]:
    """A sequence of `source` and one of `target` that has its KV, sent layer by layer while it was computed."""
    (first,), (second,) = driver().open([PROMPT], GREEDY), driver().open([PROMPT], GREEDY)
    if source is target:
        second.key = ("other", 1)
    key = ("r", 1)
    assert source.pool.ensure(first, len(PROMPT))
    assert target.pool.ensure(second, len(PROMPT))
    over.received.react = lambda event: (
        over.receiver.grant(key, second.pages, 0) if isinstance(event, Offered) else None
    )
    over.receiver.expect(key, PROMPT, CACHE_KEY)
    over.sender.begin(key, over.peer, PROMPT, CACHE_KEY, first.pages)
    (sampled,) = source.step(
        [Work(first, len(PROMPT))], lambda low, high: over.sender.ready(key, len(PROMPT), range(low, high))
    )
    over.sender.commit(key, Token(*key, 0, sampled.token_id))
    assert over.received.wait(Committed, key).received_tokens == len(PROMPT)
    over.sent.wait(Delivered, key)
    second.ids.append(sampled.token_id)
    second.num_computed = len(PROMPT)
    return first, second


def kv_of(engine: Engine, seq: Sequence) -> np.ndarray:
    """Of the prompt, all layers, all heads."""
    layout = engine.pool.layout
    return engine.pool.read(seq.pages, range(len(PROMPT)), range(layout.num_layers), range(layout.num_kv_heads))


class Between:
    """Bytes of KV that rank 0 has got from the others, and given to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.got = self.given = 0
        receive_into, write = parallel_pool.receive_into, parallel_pool.send

        def got(sock: Any, view: memoryview) -> None:
            self.got += len(view)
            receive_into(sock, view)

        def given(sock: Any, data: bytes | memoryview) -> None:
            self.given += len(data) * isinstance(data, memoryview)  # a question is bytes
            write(sock, data)

        monkeypatch.setattr(parallel_pool, "receive_into", got)
        monkeypatch.setattr(parallel_pool, "send", given)


def test_ranks_send_their_own_heads_once_and_the_text_is_that_of_one(build_model, load, driver, monkeypatch):
    directory, _ = build_model("qwen3")
    alone = load(directory, kernels="torch", page_tokens=32)
    [expected] = driver().run(alone, driver(key=b"0").open([PROMPT], GREEDY))
    layout = alone.pool.layout
    each, kv_bytes = layout.num_kv_heads // 2, layout.slice_bytes(len(PROMPT), layout.num_layers)
    halves = {(0, each), (each, 2 * each)}
    ranked = load(directory, tensor_parallel=2, threads=2)  # in pages of 16 tokens
    between = Between(monkeypatch)
    try:
        for source, target in ((ranked, alone), (alone, ranked), (ranked, ranked)):
            for direct in (True, False):
                between.got = between.given = 0
                with channel(source, target, direct, monkeypatch) as over:
                    first, second = carried(source, target, over, driver)
                assert between.got == (kv_bytes // 2 if source is ranked else 0)
                assert between.given == (kv_bytes // 2 if target is ranked else 0)
                assert np.array_equal(kv_of(source, first), kv_of(target, second))
                source.pool.release(first)
                seen = [chunk.slice for chunk in over.chunks]
                assert len(seen) > 4
                assert covers(seen, range(len(PROMPT)), layout)
                heads = {(piece.head_lo, piece.head_hi) for piece in seen}
                assert heads == (halves if source is ranked else {(0, 2 * each)})
                assert driver().run(target, [second]) == [expected]
    finally:
        ranked.close()


def test_heads_of_two_ranks_are_encoded_as_those_of_one(build_model, load, driver, monkeypatch):
    ranked = load(build_model("qwen3")[0], tensor_parallel=2, threads=2)
    try:
        with channel(ranked, ranked, True, monkeypatch, "Int8") as over:
            first, second = carried(ranked, ranked, over, driver)
        native = kv_of(ranked, first)
        encoding, layers = Encoding(wire_layout(ranked.pool.layout, "Int8")), ranked.pool.layout.num_layers
        wire = np.empty(encoding.layout.wire_bytes(len(PROMPT), layers), np.uint8)
        encoding.encode(native, len(PROMPT), layers, wire)
        expected = encoding.decode(wire.data, len(PROMPT), layers)
        assert np.array_equal(kv_of(ranked, second), expected)
        assert not np.array_equal(native, expected)
    finally:
        ranked.close()


def test_rank_0s_heads_lie_where_a_neighbour_may_read_them(build_model, load, driver):
    directory: Path = build_model("qwen3")[0]
    ranked = load(directory, tensor_parallel=2, threads=2)
    try:
        (seq,) = driver().open([PROMPT], GREEDY)
        assert ranked.pool.ensure(seq, len(PROMPT))
        ranked.step([Work(seq, len(PROMPT))])
        each = ranked.pool.layout.num_kv_heads // 2
        piece = Slice(3, 150, 0, 2, 0, each)
        views = ranked.pool.views(seq.pages, *piece.ranges)
        assert b"".join(views) == ranked.pool.read(seq.pages, *piece.ranges).tobytes()
        assert any(b"".join(views))
        assert ranked.pool.views(seq.pages, *piece.ranges[:2], range(each, 2 * each)) is None
        assert ranked.pool.views(seq.pages, *piece.ranges[:2], range(2 * each)) is None
        ranked.pool.release(seq)
    finally:
        ranked.close()
