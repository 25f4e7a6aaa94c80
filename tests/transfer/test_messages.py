"""Any bytes whatever give a message or `MalformedMessage`, in bounded memory."""

from __future__ import annotations

import contextlib
import tracemalloc
import typing

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lanewise.policy.blocks import KVLayout
from lanewise.transfer import compat
from lanewise.transfer import messages as m
from lanewise.transfer.records import Endpoint

NAMES = ("p", "d", "request", 3)
END = Endpoint("p", "f" * 64, {"weights": "abc"}, KVLayout(2, 2, 8, "float32", 4))
SAMPLES: list[m.AnyMessage] = [
    compat.hello(END, "d"),
    compat.hello_ack(END, "d", "differs", 1 << 20),
    m.Join("p", "d", "g"),
    m.Stale("p", "d", "gone"),
    m.Probe("p", "d", 5, b"12345678", b"a" * 12),
    m.ProbeAck("p", "d", 5, b"12345678"),
    m.Begin(*NAMES, 100, b"c" * 16, b"p" * 16, 1000),
    m.Grant(*NAMES, 64, 1 << 20, 30.0),
    m.BusyReply(*NAMES, 0.5),
    m.Nack(*NAMES, "no", True),
    m.Chunk(*NAMES, 7, 0, 2, 64, 100, 0, 2, b"12345678", runs=b"a" * 24),
    m.Ack(*NAMES, 3, b"\x05", 1 << 20, (4,)),
    m.Commit(*NAMES, 9, b"d" * 16, 100, b"p" * 16, 0, 42, -0.25, ((42, -0.25),), None),
    m.CommitAck(*NAMES),
    m.Abort(*NAMES, "reason"),
    m.AbortAck(*NAMES, True),
    m.Ping("p", "d", (("request", 3),)),
    m.Pong("p", "d", (), True),
]


def framed(body: bytes) -> bytes:
    """Garbage whose checksum is right, so that it reaches the decoder."""
    return m.checksum(body) + body


def test_every_message_has_a_sample_and_a_kind():
    assert {type(sample) for sample in SAMPLES} == set(typing.get_args(m.AnyMessage))
    assert len({m.kind(sample) for sample in SAMPLES}) == len(SAMPLES)


@pytest.mark.parametrize("message", SAMPLES, ids=m.kind)
def test_round_trip(message):
    assert m.decode(m.encode(message)) == message
    assert m.decode(memoryview(m.encode(message))) == message


@pytest.mark.parametrize("message", SAMPLES, ids=m.kind)
def test_a_flipped_bit_or_a_cut_anywhere_is_noticed(message):
    good = m.encode(message)
    for at in range(len(good)):
        for bad in (good[:at], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]):
            with pytest.raises(m.MalformedMessage):
                m.decode(bad)


@pytest.mark.parametrize("message", SAMPLES, ids=m.kind)
def test_fields_of_a_later_version_are_ignored(message):
    body = m.encode(message)[8:]
    parts = [*msgspec.msgpack.decode(body), "a new field", 7]
    assert m.decode(framed(msgspec.msgpack.encode(parts))) == message


LEAF = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5)
LEAF |= st.binary(max_size=20)
FIELDS = st.lists(LEAF | st.lists(LEAF, max_size=3), max_size=16)


def attempt(frame: bytes) -> None:
    """Any other exception fails the test."""
    with contextlib.suppress(m.MalformedMessage):
        m.decode(frame)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\x96\xa5ABORT" + b"\x91" * 50_000)
@example(b"\x96\xa5ABORT\xa1p\xa1d\xa1r\x01\xa3" + b"\xff" * 3)
def test_arbitrary_bytes(body):
    attempt(body)
    attempt(framed(body))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_right_tag_with_arbitrary_fields(data):
    tag = m.kind(data.draw(st.sampled_from(SAMPLES)))
    attempt(framed(msgspec.msgpack.encode([tag, *data.draw(FIELDS)])))


def test_memory_is_bounded_whatever_lengths_are_claimed():
    claims = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
    tracemalloc.start()
    for sample in SAMPLES:
        body = m.encode(sample)[8:]
        for at in range(len(body)):
            for claim in claims:
                attempt(framed(body[:at] + claim + body[at:]))
    attempt(b"x" * (m.MAX_HEADER_BYTES + 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * m.MAX_HEADER_BYTES


def test_limits_are_wide_enough_for_the_longest_prompt():
    chain = bytes(m.MAX_TOKENS // 64 * 16)
    begin = m.Begin("p" * 64, "d" * 64, "r" * 128, 1, m.MAX_TOKENS, chain, bytes(16), 1 << 40)
    assert m.decode(m.encode(begin)) == begin
    assert len(m.clip("x" * 10_000)) == m.MAX_REASON
