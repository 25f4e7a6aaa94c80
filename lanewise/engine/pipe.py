"""Messages between the ranks of one worker, over socket pairs. Owns: framing and records. Must not: know tensors."""

from __future__ import annotations

import socket
from array import array
from collections.abc import Iterable, Sequence

import msgspec

from lanewise.kernels.plan import Span

LENGTH_BYTES = 8


class Lost(RuntimeError):
    """The other side is gone, or says nothing within its time."""


class Setup(msgspec.Struct):
    """First message to a follower; it answers when its weights are there."""

    config: str  # WorkerConfig as JSON, of this rank
    rank: int
    size: int
    port: int  # where the ranks meet


class Batch(msgspec.Struct, array_like=True):
    """One forward pass: for each span pages and ids as C ints, its context, and whether its next token is wanted.

    `carried`: spans whose id rank 0 has on its device alone; all ranks get them from there."""

    spans: list[tuple[bytes, int, bytes, bool]]
    carried: list[int]

    @classmethod
    def of(
        cls, spans: Sequence[Span], ids: Sequence[Sequence[int]], sampled: Sequence[bool], carried: Iterable[int]
    ) -> Batch:
        parts = zip(spans, ids, sampled, strict=True)
        return cls(
            [(array("i", s.pages).tobytes(), s.num_context, array("i", new).tobytes(), flag) for s, new, flag in parts],
            list(carried),
        )

    def parts(self) -> tuple[list[Span], list[list[int]], list[bool]]:
        """The first arguments of `of`."""
        ids = [_ints(new).tolist() for _, _, new, _ in self.spans]
        spans = [
            Span(_ints(pages), context, len(new)) for (pages, context, _, _), new in zip(self.spans, ids, strict=True)
        ]
        return spans, ids, [flag for *_, flag in self.spans]


class Copy(msgspec.Struct, array_like=True):
    """KV of some tokens of some layers of some heads: asked for, or (`write`) in the message that follows."""

    write: bool
    pages: bytes
    tokens: tuple[int, int]
    layers: tuple[int, int]
    heads: tuple[int, int]  # as the rank that is asked counts its own

    def ranges(self) -> tuple[Sequence[int], range, range, range]:
        return _ints(self.pages), range(*self.tokens), range(*self.layers), range(*self.heads)


def _ints(data: bytes) -> array[int]:
    return array("i", data)


def send(sock: socket.socket, data: bytes | memoryview) -> None:
    """Raises Lost where nobody reads."""
    try:
        sock.sendall(len(data).to_bytes(LENGTH_BYTES, "little"))
        sock.sendall(data)
    except OSError as error:
        raise Lost(f"a rank takes no messages: {error}") from error


def receive(sock: socket.socket) -> memoryview:
    """The next message, within the socket's timeout. Raises Lost at the end of the stream."""
    data = memoryview(bytearray(_length(sock)))
    _fill(sock, data)
    return data


def receive_into(sock: socket.socket, view: memoryview) -> None:
    """The next message, which fills `view`; ValueError where it has another length: the stream is then of no use."""
    if (size := _length(sock)) != len(view):
        raise ValueError(f"a rank answers with {size} bytes, not {len(view)}")
    _fill(sock, view)


def _length(sock: socket.socket) -> int:
    data = bytearray(LENGTH_BYTES)
    _fill(sock, memoryview(data))
    return int.from_bytes(data, "little")


def _fill(sock: socket.socket, view: memoryview) -> None:
    while view:
        try:
            got = sock.recv_into(view)
        except OSError as error:
            raise Lost(f"a rank does not answer: {error}") from error
        if not got:
            raise Lost("a rank has ended")
        view = view[got:]
