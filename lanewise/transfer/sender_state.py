"""One outgoing transfer: its walk through `SENDER_NEXT` and its timers. Pure.

Owns: GRANT wait, ACK progress, COMMIT_ACK and lease of one transfer, and the messages it sends.
Must not: read pages, touch sockets, or know other transfers.
"""

from __future__ import annotations

from lanewise.policy.blocks import UNIT_TOKENS
from lanewise.request import Token
from lanewise.transfer import messages as m
from lanewise.transfer.protocol import SENDER_NEXT, Action, Emit, Entered, Send, SenderInput, SenderState
from lanewise.transfer.records import (
    Aborted,
    Binding,
    Busy,
    Delivered,
    Endpoint,
    Granted,
    Key,
    Pages,
    Peer,
    Sent,
    Timers,
)
from lanewise.transfer.send_window import BrokenTransfer, Job, SendWindow

MAX_BEGINS = 4

_NEVER = float("inf")
_ENTERED = {state: Entered(f"send.{state}") for state in SenderState}


class SenderTransfer:
    def __init__(
        self,
        key: Key,
        peer: Peer,
        binding: Binding,
        pages: Pages,
        *,
        identity: Endpoint,
        timers: Timers,
        head_shards: int,
    ) -> None:
        self.key = key
        self.peer = peer
        self.pages = pages
        self.state = SenderState.QUEUED
        self.have_tokens = 0
        self.mac_key = b""
        self.window = SendWindow(identity.layout, binding.tokens, head_shards)
        self._binding = binding
        self._source = identity.incarnation
        self._layout = identity.layout
        self._timers = timers
        self._token: Token | None = None
        self._begins = 0
        self._commits = 0
        self._digest = b""
        self._offered_at = self._resend_at = self._lease_at = self._commit_at = _NEVER
        self._progress_at = 0.0

    @property
    def streaming(self) -> bool:
        return self.state in (SenderState.STREAMING, SenderState.AWAIT_ACK)

    @property
    def ended(self) -> bool:
        return self.state in (SenderState.RELEASED, SenderState.ABORTED)

    # --- the loop's side

    def link_up(self, now: float) -> list[Action]:
        actions = self._enter(SenderInput.LINK_UP)
        if not actions:
            return []
        self._begins += 1
        if self._begins > MAX_BEGINS:
            return self.fail("the decode worker keeps asking for HELLO")
        self._offered_at = now
        self._resend_at = now + self._timers.begin_resend_s
        return [*actions, self._begin()]

    def ready(self, tokens: int, layers: range | None) -> None:
        self.window.ready(tokens, layers if layers is not None else range(self._layout.num_layers))

    def commit(self, token: Token, now: float) -> list[Action]:
        if (token.request_id, token.epoch) != self.key:
            return self.fail("commit with the token of another request")
        self._token = token
        self.ready(self._binding.tokens, None)
        return self._maybe_commit(now)

    def fail(self, reason: str, mismatch: bool = False) -> list[Action]:
        actions = self._enter(SenderInput.FAIL)
        return [*actions, Emit(Aborted(self.key, reason, mismatch))] if actions else []

    # --- chunks

    def take(self, chunk_bytes: int) -> Job | None:
        taken = self.window.take(chunk_bytes) if self.streaming else None
        return None if taken is None else Job(self.key, self.pages, *taken)

    def chunk(self, job: Job, crc: bytes) -> m.Chunk:
        piece = job.slice
        where = (piece.layer_lo, piece.layer_hi, piece.token_lo, piece.token_hi, piece.head_lo, piece.head_hi)
        return m.Chunk(*self._names, job.seq, *where, crc, words=job.words)

    def sent(self, job: Job, crc: bytes, delivered: bool, now: float) -> list[Action]:
        if not self.window.unacked:
            self._progress(now)
        try:
            self.window.sent(job, crc, delivered)
        except BrokenTransfer as broken:
            return self.fail(str(broken))
        return self._maybe_commit(now)

    # --- messages

    def receive(self, message: m.TransferMessage, now: float) -> list[Action]:
        self.renew(now)
        match message:
            case m.Grant():
                return self._granted(message, now)
            case m.Ack():
                return self._acked(message, now)
            case m.CommitAck():
                return self._then(SenderInput.COMMIT_ACK, Emit(Delivered(self.key)))
            case m.BusyReply():
                return self._then(SenderInput.REFUSED, Emit(Busy(self.key, message.retry_after_s)))
            case m.Nack(hello_first=True):
                return self._enter(SenderInput.HELLO_FIRST)
            case m.Nack():
                return self._then(SenderInput.REFUSED, Emit(Aborted(self.key, message.reason)))
            case m.Abort():
                return self.fail(f"decode worker: {message.reason}")
            case _:
                return []

    def renew(self, now: float) -> None:
        self._lease_at = now + self._timers.lease_s

    def _granted(self, grant: m.Grant, now: float) -> list[Action]:
        if grant.have_tokens % UNIT_TOKENS or grant.have_tokens > self._binding.tokens:
            return self.fail(f"GRANT with have_tokens={grant.have_tokens} of {self._binding.tokens}")
        actions = self._enter(SenderInput.GRANT)
        if actions or self.streaming:  # a second GRANT answers a second BEGIN: only its credit may be news
            self.window.credit = max(self.window.credit, grant.credit)
        if not actions:
            return []
        self.have_tokens = grant.have_tokens
        self.window.skip(grant.have_tokens)
        return [*actions, Emit(Granted(self.key, grant.have_tokens)), *self._maybe_commit(now)]

    def _acked(self, ack: m.Ack, now: float) -> list[Action]:
        if not self.streaming:
            return []
        try:
            if self.window.acked(ack):
                self._progress(now)
        except BrokenTransfer as broken:
            return self.fail(str(broken))
        return []

    # --- COMMIT

    def _maybe_commit(self, now: float) -> list[Action]:
        if self._token is None or self.state is not SenderState.STREAMING or not self.window.all_sent:
            return []
        self._digest = self.window.digest()
        self._commits = 1
        self._commit_at = now + self._timers.commit_ack_s
        sent = Emit(Sent(self.key, self.window.sent_bytes))
        return [*self._enter(SenderInput.ALL_SENT), sent, self._commit()]

    def _commit(self) -> Send:
        token = self._token
        assert token is not None
        finish = None if token.finish is None else str(token.finish)
        message = m.Commit(
            *self._names,
            chunks=self.window.num_chunks,
            digest=self._digest,
            tokens=self._binding.tokens,
            prompt=self._binding.prompt,
            index=token.index,
            token_id=token.token_id,
            logprob=token.logprob,
            top=token.top[: m.MAX_TOP],
            finish=finish,
        )
        return Send(self.peer.kv_address, message)

    def _begin(self) -> Send:
        bound = self._binding
        total = self._layout.slice_bytes(bound.tokens, self._layout.num_layers)
        begin = m.Begin(*self._names, bound.tokens, bound.chain, bound.prompt, total, self.mac_key)
        return Send(self.peer.kv_address, begin)

    @property
    def _names(self) -> tuple[str, str, str, int]:
        return (self._source, self.peer.incarnation, *self.key)

    # --- time

    @property
    def deadline(self) -> float:
        match self.state:
            case SenderState.OFFERED:
                return min(self._resend_at, self._offered_at + self._timers.grant_wait_s)
            case SenderState.STREAMING | SenderState.AWAIT_ACK:
                if self.window.unacked:
                    return min(self._lease_at, self._resend_at, self._progress_at + self._timers.ack_abort_s)
                return min(self._lease_at, self._commit_at)
            case _:
                return _NEVER

    def tick(self, now: float) -> list[Action]:
        if now < self.deadline:
            return []
        if self.state is SenderState.OFFERED:
            if now >= self._offered_at + self._timers.grant_wait_s:
                return self.fail("no GRANT in time")
            self._resend_at = now + self._timers.begin_resend_s
            return [self._begin()]
        if now >= self._lease_at:
            return self.fail("lease ran out")
        if not self.window.unacked:
            return self._commit_again(now)
        if now >= self._progress_at + self._timers.ack_abort_s:
            return self.fail("no ACK progress")
        self._resend_at = now + self._timers.ack_resend_s
        self.window.resend_all()
        return []

    def _commit_again(self, now: float) -> list[Action]:
        if self._commits >= self._timers.commit_tries:
            return self.fail("no COMMIT_ACK; the decode worker may or may not have the KV")
        self._commits += 1
        self._commit_at = now + self._timers.commit_ack_s
        return [self._commit()]

    def _progress(self, now: float) -> None:
        self._progress_at = now
        self._resend_at = now + self._timers.ack_resend_s
        if self._commits:  # COMMIT_ACK is due only once nothing is missing
            self._commit_at = now + self._timers.commit_ack_s

    def _then(self, event: SenderInput, action: Action) -> list[Action]:
        actions = self._enter(event)
        return [*actions, action] if actions else []

    def _enter(self, event: SenderInput) -> list[Action]:
        after = SENDER_NEXT.get((self.state, event))
        if after is None:
            return []
        self.state = after
        return [_ENTERED[after]]
