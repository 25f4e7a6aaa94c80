"""Buffers of outgoing chunks: used again, and not held back by a connection that is stuck."""

from __future__ import annotations

from dataclasses import dataclass

from lanewise.transfer.buffers import Buffers


@dataclass
class Tracker:
    done: bool = False


def test_a_buffer_is_used_again_once_its_bytes_have_left():
    buffers, tracker = Buffers(4), Tracker()
    first = buffers.take(100)
    buffers.lend(first, tracker)
    second = buffers.take(100)
    assert second is not first
    tracker.done = True
    assert buffers.take(100) is first


def test_a_stuck_connection_does_not_hold_the_buffers_of_others():
    buffers = Buffers(4)
    buffers.lend(buffers.take(100), Tracker())  # never leaves
    seen = set()
    for _ in range(100):
        buffer = buffers.take(100)
        seen.add(id(buffer))
        buffers.lend(buffer, Tracker(done=True))
    assert len(seen) <= 6


def test_a_larger_chunk_gets_a_larger_buffer():
    buffers = Buffers(4)
    buffers.give_back(buffers.take(100))
    assert buffers.take(200).nbytes == 200
