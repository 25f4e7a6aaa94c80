"""Messages of the channel that leave together as one ZeroMQ message, and are taken apart again.

Each ZeroMQ message costs both sides a wake-up of a thread, so what a turn has to say to one partner leaves as one.
Owns: which frame is a header and which a payload, and how many there may be. Must not: know connections or states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import zmq

from lanewise.transfer import messages as m
from lanewise.transfer.faults import Frames

MOST = 32
"""Messages that leave together."""
MESSAGES_PER_TURN = 64
"""So many, or a bundle more, are heard of one socket; then commands, timers and the other sockets have their turn."""

NOBLOCK = int(zmq.NOBLOCK)  # numbers: combining and looking up the enums costs more than a send
MORE = int(zmq.SNDMORE) | NOBLOCK
EMPTY = memoryview(b"")
_KEPT_FRAMES = MOST + 1  # and the name of a ROUTER's connection
_ANY_SIZE = 3  # of these; a payload is the third at the latest
_WITH_PAYLOAD = (m.Chunk, m.Probe)


def receive(sock: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """The next ZeroMQ message; raises Again where there is none. Of frames that no partner sends none is kept."""
    frame = sock.recv(NOBLOCK, copy=False)
    frames = [frame]
    while frame.more:
        frame = sock.recv(copy=False)
        if len(frames) < _ANY_SIZE or (len(frames) < _KEPT_FRAMES and len(frame) <= m.MAX_HEADER_BYTES):
            frames.append(frame)
    return frames


def apart(frames: Sequence[zmq.Frame]) -> Iterator[tuple[m.AnyMessage, memoryview]]:
    """Each message and its payload. MalformedMessage at the first that is none: what follows that one is not read."""
    if not frames:
        raise m.MalformedMessage("no header")
    rest = iter(frames)
    for frame in rest:
        message = m.decode(frame.buffer)
        last = next(rest, None) if isinstance(message, _WITH_PAYLOAD) else None
        yield message, EMPTY if last is None else last.buffer


def send_now(sock: zmq.Socket[bytes], frames: Sequence[bytes | memoryview]) -> bool:
    """Without waiting; False: no room now."""
    try:
        for frame in frames[:-1]:
            sock.send(frame, MORE)
        sock.send(frames[-1], NOBLOCK)  # there is room for the rest of a message that has begun
    except zmq.Again:
        return False
    return True


def send_queued(sock: zmq.Socket[bytes], queue: deque[Frames], most: int, *name: bytes) -> None:
    """Takes messages off the queue as long as there is room, at most so many together; `name`: of a ROUTER's
    connection."""
    while queue:
        chosen = list(islice(queue, most))
        if not send_now(sock, [*name, *chain.from_iterable(chosen)]):
            return
        for _ in chosen:
            queue.popleft()
