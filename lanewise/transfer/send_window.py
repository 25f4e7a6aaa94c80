"""The chunks of one outgoing transfer: cut, sent, acknowledged, to be sent again, and the credit for new ones. Pure.

Must not: know states, messages' addressing, or time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lanewise.policy.blocks import KVLayout
from lanewise.transfer import messages as m
from lanewise.transfer.chunks import Cutter, Slice, digest
from lanewise.transfer.records import Key, Pages

MAX_RESENDS = 4
"""Times one chunk may arrive damaged before the path counts as broken."""


class BrokenTransfer(Exception):
    """A contradiction that ends this transfer and nothing else; the text is the reason."""


@dataclass(slots=True)
class _SentChunk:
    slice: Slice
    crc: bytes = b""  # empty until first sent
    resends: int = 0
    acked: bool = False
    words: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A chunk to gather, checksum and send now."""

    key: Key
    pages: Pages
    seq: int
    slice: Slice
    resend: bool
    words: bool = False  # which checksum it has, as in CHUNK


class SendWindow:
    def __init__(self, layout: KVLayout, tokens: int, head_shards: int = 1) -> None:
        self._layout = layout
        self._tokens = tokens
        self._cutter = Cutter(layout, tokens, head_shards)
        self._chunks: list[_SentChunk] = []
        self._cumulative = 0
        self._unsent = 0  # chunks that were cut and not handed to the network yet
        self._resend: deque[int] = deque()
        self._have_tokens = 0
        self.unacked: set[int] = set()
        self.credit = 0
        self.sent_bytes = 0  # of distinct chunks: what credit counts
        self.unacked_bytes = 0

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    @property
    def remaining_bytes(self) -> int:
        return self._layout.slice_bytes(self._tokens - self._have_tokens, self._layout.num_layers) - self.sent_bytes

    @property
    def all_sent(self) -> bool:
        return self._unsent == 0 and self._cutter.done

    def digest(self) -> bytes:
        return digest((chunk.crc, chunk.slice) for chunk in self._chunks)

    def skip(self, have_tokens: int) -> None:
        self._have_tokens = have_tokens
        self._cutter.skip(have_tokens)

    def ready(self, tokens: int, layers: range) -> None:
        self._cutter.ready(tokens, layers)

    def wants(self, chunk_bytes: int) -> bool:
        """Whether `take` would return a chunk: one to resend, or a new one within the credit."""
        while self._resend and self._chunks[self._resend[0]].acked:
            self._resend.popleft()
        if self._resend:
            return True
        piece = self._cutter.peek(chunk_bytes)
        return piece is not None and self.sent_bytes + piece.nbytes(self._layout) <= self.credit

    def take(self, chunk_bytes: int) -> tuple[int, Slice, bool, bool] | None:
        """(sequence number, what, whether it goes again, and then whether its checksum is of words)."""
        if not self.wants(chunk_bytes):
            return None
        if self._resend:
            seq = self._resend.popleft()
            return seq, self._chunks[seq].slice, True, self._chunks[seq].words
        piece = self._cutter.peek(chunk_bytes)
        assert piece is not None
        self._cutter.take(piece)
        self._chunks.append(_SentChunk(piece))
        self._unsent += 1
        return len(self._chunks) - 1, piece, False, False

    def sent(self, job: Job, crc: bytes, delivered: bool) -> None:
        """Handed to the network, or (`delivered` False) the network took it not and it must go again."""
        chunk = self._chunks[job.seq]
        if chunk.crc not in (b"", crc):
            raise BrokenTransfer("the KV of this transfer changed while it was sent")
        if not job.resend:
            chunk.crc, chunk.words = crc, job.words
            self._unsent -= 1
            self.sent_bytes += job.slice.nbytes(self._layout)
            self.unacked.add(job.seq)
            self.unacked_bytes += job.slice.nbytes(self._layout)
        if not delivered:
            self._resend.append(job.seq)

    def resend_all(self) -> None:
        self._resend = deque(sorted(self.unacked))

    def acked(self, ack: m.Ack) -> bool:
        """Takes an ACK in; whether it brought anything new."""
        if ack.cumulative > len(self._chunks):
            raise BrokenTransfer("ACK of a chunk that was never sent")
        before = len(self.unacked), self.credit
        for seq in range(self._cumulative, ack.cumulative):
            self._mark(seq)
        self._cumulative = max(self._cumulative, ack.cumulative)
        for index, byte in enumerate(ack.bitmap):
            for bit in range(8):
                if byte >> bit & 1:
                    self._mark(ack.cumulative + index * 8 + bit)
        self.credit = max(self.credit, ack.credit)
        for seq in ack.bad:
            self._damaged(seq)
        return (len(self.unacked), self.credit) != before

    def _damaged(self, seq: int) -> None:
        if seq >= len(self._chunks) or self._chunks[seq].acked or seq in self._resend:
            return
        chunk = self._chunks[seq]
        chunk.resends += 1
        if chunk.resends > MAX_RESENDS:
            raise BrokenTransfer(f"chunk {seq} arrived damaged {chunk.resends} times")
        self._resend.append(seq)

    def _mark(self, seq: int) -> None:
        if seq < len(self._chunks):
            self._chunks[seq].acked = True
            if seq in self.unacked:
                self.unacked.discard(seq)
                self.unacked_bytes -= self._chunks[seq].slice.nbytes(self._layout)
