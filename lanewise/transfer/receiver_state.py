"""One incoming transfer: its walk through `RECEIVER_NEXT`, what has arrived, and its lease. Pure.

Owns: which chunks are in place, COMMIT held until they all are, and the proof that they are the whole.
Must not: touch bytes or sockets, or know other transfers. Credit amounts come from the core.
"""

from __future__ import annotations

from lanewise.policy.blocks import DIGEST_BYTES, UNIT_TOKENS, KVLayout
from lanewise.request import FinishReason, Token
from lanewise.transfer import messages as m
from lanewise.transfer.chunks import Slice, covers, digest
from lanewise.transfer.protocol import (
    RECEIVER_NEXT,
    Action,
    Emit,
    Entered,
    ReceiverInput,
    ReceiverState,
    Write,
)
from lanewise.transfer.records import Binding, Committed, Key, Offered, Pages

_MAX_BAD = 256
_ENTERED = {state: Entered(f"recv.{state}") for state in ReceiverState}


class Contradiction(Exception):
    """What a correct sender would not say; ends the transfer, the text is the reason."""


class ReceiverTransfer:
    def __init__(self, key: Key, layout: KVLayout, *, bound: bool = True) -> None:
        """`bound` False, for tests of the tests only: believes that offered KV is of the expected prompt."""
        self.key = key
        self._bound = bound
        self.state = ReceiverState.EXPECTED
        self.peer = ""  # incarnation of the sender, once BEGIN came
        self.mac_key = b""
        self.expected: Binding | None = None
        self.offered: Binding | None = None
        self.have_tokens = 0
        self.pages: Pages = None
        self.received_bytes = 0
        self.credited_bytes = 0
        self.ack_due = False
        self.lease_at = self.hold_until = float("inf")
        self._layout = layout
        self._chunks: dict[int, tuple[bytes, Slice]] = {}
        self._writing: dict[int, tuple[bytes, Slice]] = {}
        self._cumulative = 0
        self._bad: list[int] = []
        self._commit: m.Commit | None = None

    @property
    def live(self) -> bool:
        return self.state not in (ReceiverState.COMMITTED, ReceiverState.DRAINING, ReceiverState.FREED)

    @property
    def receiving(self) -> bool:
        return self.state in (ReceiverState.GRANTED, ReceiverState.RECEIVING, ReceiverState.VERIFYING)

    @property
    def tokens(self) -> int:
        bound = self.offered or self.expected
        return bound.tokens if bound else 0

    @property
    def missing_bytes(self) -> int:
        """Bytes of this transfer that have not arrived."""
        return self._layout.slice_bytes(self.tokens - self.have_tokens, self._layout.num_layers) - self.received_bytes

    # --- inputs; each may raise Contradiction

    def expect(self, binding: Binding) -> list[Action]:
        self.expected = binding
        return self._agree(ReceiverInput.EXPECT)

    def begin(self, peer: str, binding: Binding) -> list[Action]:
        self.peer, self.offered = peer, binding
        if self.expected is None:
            self.state = ReceiverState.HELD  # the initial state of a transfer that starts with BEGIN
            return [Entered("recv.held")]
        return self._agree(ReceiverInput.BEGIN)

    def _agree(self, event: ReceiverInput) -> list[Action]:
        """Both sides hashed their own ids: KV of another prompt, model or tenant stops here."""
        if self.expected is None or self.offered is None:
            return []
        if self.expected != self.offered and (self._bound or self.expected.tokens != self.offered.tokens):
            raise Contradiction(_disagreement(self.expected, self.offered))
        actions = self._enter(event)
        return [*actions, Emit(Offered(self.key, self.tokens))] if actions else []

    def grant(self, pages: Pages, have_tokens: int) -> list[Action]:
        if have_tokens % UNIT_TOKENS or not 0 <= have_tokens <= self.tokens:
            raise Contradiction(f"granted with have_tokens={have_tokens} of {self.tokens}")
        actions = self._enter(ReceiverInput.GRANT)
        if actions:
            self.pages, self.have_tokens = pages, have_tokens
        return actions

    def chunk(self, chunk: m.Chunk, payload_bytes: int) -> list[Action]:
        actions = self._enter(ReceiverInput.CHUNK)
        if not actions and not self.receiving:
            return []
        piece = chunk.slice
        if chunk.seq in self._chunks or chunk.seq in self._writing:
            self.ack_due = True  # our ACK was lost, or the sender is impatient
            return actions
        self._check(chunk, piece, payload_bytes)
        self._writing[chunk.seq] = (chunk.crc, piece)
        return [*actions, Write(self.key, self.pages, chunk.seq, piece, chunk.crc, chunk.words)]

    def _check(self, chunk: m.Chunk, piece: Slice, payload_bytes: int) -> None:
        inside = (
            self.have_tokens <= piece.token_lo < piece.token_hi <= self.tokens
            and 0 <= piece.layer_lo < piece.layer_hi <= self._layout.num_layers
            and 0 <= piece.head_lo < piece.head_hi <= self._layout.num_kv_heads
            and piece.token_lo % self._layout.wire_unit == 0
            and (piece.token_hi % self._layout.wire_unit == 0 or piece.token_hi == self.tokens)
        )
        if not inside:
            raise Contradiction(f"chunk {chunk.seq} lies outside what was granted")
        if chunk.seq >= (self.tokens - self.have_tokens) * self._layout.num_layers * self._layout.num_kv_heads:
            raise Contradiction(f"chunk number {chunk.seq} is impossible")
        size = piece.nbytes(self._layout)
        whole = payload_bytes == piece.wire_bytes(self._layout)
        if whole and self.received_bytes + size > self.credited_bytes:
            raise Contradiction("the sender went beyond its credit")

    def wrote(self, seq: int, good: bool, spoiled: bool = False) -> list[Action]:
        """The copy of a chunk ended; not `good`: damaged on the way. Then nothing was written, or it `spoiled` the
        place of this chunk, which must be no other's."""
        record = self._writing.pop(seq, None)
        if self.state is ReceiverState.DRAINING or record is None or not self.live:
            return []
        self.ack_due = True
        if spoiled and any(record[1].overlaps(piece) for _, piece in (*self._chunks.values(), *self._writing.values())):
            raise Contradiction(f"damaged chunk {seq} lies over another")
        if not good:
            if len(self._bad) < _MAX_BAD:
                self._bad.append(seq)
            return []
        self._chunks[seq] = record
        self.received_bytes += record[1].nbytes(self._layout)
        while self._cumulative in self._chunks:
            self._cumulative += 1
        return self._verify()

    def commit(self, commit: m.Commit) -> list[Action]:
        actions = self._enter(ReceiverInput.COMMIT)
        if self.state is not ReceiverState.VERIFYING:
            return []
        bound = self.expected
        assert bound is not None
        if commit.tokens != bound.tokens or (commit.prompt != bound.prompt and self._bound):
            raise Contradiction("COMMIT of another prompt")
        if self._commit is not None:
            self.ack_due = True  # tells the sender what is missing
            return []  # the first one stands
        self._commit = commit
        return [*actions, *self._verify()]

    def _verify(self) -> list[Action]:
        commit = self._commit
        if commit is None or self._cumulative < commit.chunks or self._writing:
            return []
        if len(self._chunks) != commit.chunks:
            raise Contradiction("more chunks than COMMIT counts")
        if digest(self._chunks[seq] for seq in range(commit.chunks)) != commit.digest:
            raise Contradiction("digest of the transfer differs")
        pieces = (piece for _, piece in self._chunks.values())
        if not covers(pieces, range(self.have_tokens, self.tokens), self._layout):
            raise Contradiction("the chunks do not cover the prompt")
        token = _token(self.key, commit)
        actions = self._enter(ReceiverInput.COMPLETE)
        done = Committed(self.key, token, self.tokens - self.have_tokens, self.received_bytes)
        return [*actions, Emit(done)]

    def stop(self) -> list[Action]:
        return self._enter(ReceiverInput.STOP)

    def drained(self) -> list[Action]:
        """FREED as soon as no copy is under way; call again after each `wrote`."""
        return [] if self._writing else self._enter(ReceiverInput.DRAINED)

    def ack(self, source: str) -> m.Ack:
        self.ack_due = False
        bad, self._bad = tuple(self._bad), []
        return m.Ack(source, self.peer, *self.key, self._cumulative, self._bitmap(), self.credited_bytes, bad)

    def _bitmap(self) -> bytes:
        beyond = len(self._chunks) - self._cumulative
        if beyond <= 0:
            return b""
        bits = 0
        for seq in self._chunks:
            if seq > self._cumulative:
                bits |= 1 << (seq - self._cumulative)
        return bits.to_bytes((bits.bit_length() + 7) // 8, "little")

    def _enter(self, event: ReceiverInput) -> list[Action]:
        after = RECEIVER_NEXT.get((self.state, event))
        if after is None:
            return []
        changed = after is not self.state
        self.state = after
        return [_ENTERED[after]] if changed else []


def _token(key: Key, commit: m.Commit) -> Token:
    try:
        finish = None if commit.finish is None else FinishReason(commit.finish)
    except ValueError:
        raise Contradiction(f"unknown finish reason {commit.finish!r}") from None
    return Token(*key, commit.index, commit.token_id, commit.logprob, commit.top, finish)


def _disagreement(mine: Binding, theirs: Binding) -> str:
    if mine.tokens != theirs.tokens:
        return f"content: {mine.tokens} tokens here, {theirs.tokens} offered"
    same = 0
    for at in range(0, len(mine.chain), DIGEST_BYTES):
        if mine.chain[at : at + DIGEST_BYTES] != theirs.chain[at : at + DIGEST_BYTES]:
            break
        same += UNIT_TOKENS
    return f"content: the offered prompt or cache key differs after {same} tokens"
