"""Messages that leave as one ZeroMQ message arrive as what they were, and a damaged one takes none before it along."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from lanewise.transfer import messages as m
from lanewise.transfer.bundles import EMPTY, MOST, apart, receive, send_queued
from tests.transfer.test_messages import SAMPLES

WITHOUT_PAYLOAD = [sample for sample in SAMPLES if not isinstance(sample, m.Chunk | m.Probe)]
CHUNK = next(sample for sample in SAMPLES if isinstance(sample, m.Chunk))
MESSAGES = st.sampled_from(WITHOUT_PAYLOAD).map(lambda message: (message, None)) | st.tuples(
    st.just(CHUNK), st.binary(max_size=50)
)

Pair = tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ends = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ends[0].bind("inproc://bundles")
    ends[1].connect("inproc://bundles")
    yield ends
    context.destroy(linger=0)


def heard(sock: zmq.Socket[bytes]) -> list[list[tuple[m.AnyMessage, bytes]]]:
    """Of each ZeroMQ message that is here."""
    found = []
    while sock.poll(0):
        found.append([(message, bytes(payload)) for message, payload in apart(receive(sock))])
    return found


@given(said=st.lists(MESSAGES, max_size=2 * MOST + 3), most=st.integers(1, MOST))
def test_they_arrive_in_order_and_with_their_payloads(
    pair: Pair, said: list[tuple[m.AnyMessage, bytes | None]], most: int
) -> None:
    payloads = sum(payload is not None for _, payload in said)
    most = min(most, max(1, MOST - payloads))  # data goes by connections of its own, one chunk at a time
    queue = deque([m.encode(message), *([] if payload is None else [payload])] for message, payload in said)
    send_queued(pair[0], queue, most)
    assert not queue
    bundles = heard(pair[1])
    assert [len(bundle) for bundle in bundles] == [len(said[at : at + most]) for at in range(0, len(said), most)]
    assert [each for bundle in bundles for each in bundle] == [(message, payload or b"") for message, payload in said]


def test_what_follows_a_damaged_one_is_not_read(pair: Pair) -> None:
    good = m.encode(WITHOUT_PAYLOAD[0])
    send_queued(pair[0], deque([[good], [good[:-1] + bytes([good[-1] ^ 1])], [good]]), MOST)
    messages = apart(receive(pair[1]))
    assert next(messages) == (WITHOUT_PAYLOAD[0], EMPTY)
    with pytest.raises(m.MalformedMessage, match="header checksum"):
        next(messages)
    assert list(messages) == []


@given(st.lists(st.binary(max_size=40) | st.sampled_from([m.encode(s) for s in SAMPLES]), max_size=3 * MOST))
def test_any_frames_are_messages_or_refused_and_only_so_many_are_kept(pair: Pair, frames: list[bytes]) -> None:
    pair[0].send_multipart(frames or [b""])
    kept = receive(pair[1])
    assert len(kept) <= MOST + 1
    with contextlib.suppress(m.MalformedMessage):
        assert 0 < len(list(apart(kept))) <= len(frames)
    assert not pair[1].poll(0)


def test_large_frames_that_no_partner_sends_are_not_kept(pair: Pair) -> None:
    large = bytes(m.MAX_HEADER_BYTES + 1)
    pair[0].send_multipart([large] * MOST)
    assert len(receive(pair[1])) == 3
