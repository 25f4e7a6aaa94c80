"""All incoming transfers of one decode worker. Pure: messages, commands and time in, actions out.

Owns: expectations, epoch fences, recorded answers, credit, and the end of every transfer.
Must not: touch page bytes or sockets.
"""

from __future__ import annotations

from collections.abc import Callable

from lanewise.transfer import messages as m
from lanewise.transfer.credit import CreditPool
from lanewise.transfer.known_senders import KnownSenders
from lanewise.transfer.protocol import Action, Emit, ReceiverState, Send
from lanewise.transfer.receiver_state import Contradiction, ReceiverTransfer
from lanewise.transfer.records import (
    Aborted,
    Binding,
    Counters,
    Drained,
    Endpoint,
    Key,
    Limits,
    Pages,
    Timers,
)
from lanewise.transfer.tombstones import Tombstones

_BUSY_RETRY_S = 0.5


class ReceiverCore:
    def __init__(self, identity: Endpoint, timers: Timers, limits: Limits, counters: Counters) -> None:
        self._me = identity.incarnation
        self._layout = identity.layout
        self._timers = timers
        self._limits = limits
        self._counters = counters
        self._senders = KnownSenders(identity, timers, limits)
        self._transfers: dict[Key, ReceiverTransfer] = {}
        self._draining: dict[Key, tuple[ReceiverTransfer, list[Action]]] = {}
        self._tombstones = Tombstones(timers.tombstone_s)
        self._dirty: set[Key] = set()
        self.credit = CreditPool(limits)

    @property
    def incarnation(self) -> str:
        return self._me

    @property
    def live(self) -> int:
        return len(self._transfers)

    # --- the loop's side

    def expect(self, key: Key, binding: Binding, now: float) -> list[Action]:
        if self._tombstones.fences(key):
            return [Emit(Aborted(key, "stale epoch"))]
        if (answer := self._tombstones.answer(key)) is not None:
            return [Emit(Aborted(key, getattr(answer, "reason", "this attempt has already ended")))]
        actions = self._supersede(key, now)
        transfer = self._transfers.setdefault(key, ReceiverTransfer(key, self._layout))
        if transfer.expected is not None:
            return actions  # the same Submit twice: the first one stands
        return actions + self._guard(transfer, lambda: transfer.expect(binding), now)

    def grant(self, key: Key, pages: Pages, have_tokens: int, now: float) -> list[Action]:
        transfer = self._transfers.get(key)
        if transfer is None or transfer.state is not ReceiverState.OFFERED:
            return []  # it ended meanwhile and the loop has been told
        actions = self._guard(transfer, lambda: transfer.grant(pages, have_tokens), now)
        if transfer.live:
            self.credit.top_up(transfer)
            self._counters.prefix_skipped_tokens += have_tokens
            actions.append(self._grant(transfer))
        return actions

    def refuse(self, key: Key, busy: bool, reason: str, retry_after_s: float, now: float) -> list[Action]:
        transfer = self._transfers.get(key)
        if transfer is None or transfer.state is not ReceiverState.OFFERED:
            return []
        answer: m.FromReceiver = m.Nack(*self._names(transfer), m.clip(reason))
        if busy:
            answer = m.BusyReply(*self._names(transfer), retry_after_s)
        self._counters.busy += busy
        self._counters.refused += not busy
        return self._stop(transfer, answer, [], now)

    def cancel(self, key: Key, reason: str, now: float) -> list[Action]:
        """Drained follows in every case, so that the loop needs no case of its own."""
        self._counters.drained += 1
        drained = Emit(Drained(key))
        if key in self._draining:
            self._draining[key][1].append(drained)
            return []
        transfer = self._transfers.get(key)
        if transfer is None:
            return [drained]
        return self._stop(transfer, self._ended(transfer, f"cancelled: {reason}"), [drained], now)

    def abort_all(self, reason: str, now: float) -> list[Action]:
        return [a for transfer in list(self._transfers.values()) for a in self._abort(transfer, reason, now)]

    # --- messages

    def receive(self, message: m.AnyMessage, payload_bytes: int, now: float) -> list[Action]:
        if message.dst != self._me:
            self._counters.stale += 1
            return [Send(message.src, m.Stale(self._me, message.src, message.dst))]
        self._senders.heard(message.src, now)
        match message:
            case m.Hello():
                return [Send(message.src, self._senders.hello(message, now))]
            case m.Ping():
                return [self._ping(message, now)]
            case m.Begin():
                return self._begin(message, now)
            case m.Chunk() | m.Commit() | m.Abort():
                return self._for_transfer(message, payload_bytes, now)
            case _:
                return []

    def _ping(self, ping: m.Ping, now: float) -> Action:
        known = []
        for key in ping.live:
            transfer = self._transfers.get(key)
            if transfer is not None and transfer.peer == ping.src:
                transfer.lease_at = now + self._timers.lease_s
                known.append(key)
        return Send(ping.src, m.Pong(self._me, ping.src, tuple(known), ping.src not in self._senders))

    def _begin(self, begin: m.Begin, now: float) -> list[Action]:
        key = begin.key
        names = (self._me, begin.src, *key)
        transfer = self._transfers.get(key)
        binding = Binding(begin.tokens, begin.chain, begin.prompt)
        if begin.src not in self._senders:
            return [Send(begin.src, m.Nack(*names, "HELLO first", True))]
        if (answer := self._tombstones.answer(key, begin.src)) is not None:
            return [Send(begin.src, answer)]
        if self._tombstones.fences(key):
            return [Send(begin.src, m.Nack(*names, "stale epoch"))]
        if transfer is not None and transfer.peer:
            return self._begin_again(transfer, begin, binding)
        if transfer is None and self._full:
            return [Send(begin.src, m.BusyReply(*names, _BUSY_RETRY_S))]
        actions = self._supersede(key, now)
        if transfer is None:
            transfer = self._transfers[key] = ReceiverTransfer(key, self._layout)
            transfer.hold_until = now + self._timers.hold_begin_s
        transfer.lease_at = now + self._timers.lease_s
        fresh = transfer
        return actions + self._guard(fresh, lambda: fresh.begin(begin.src, binding), now)

    @property
    def _full(self) -> bool:
        held = sum(transfer.state is ReceiverState.HELD for transfer in self._transfers.values())
        return held >= self._limits.max_held or self.live >= self._limits.max_transfers

    def _begin_again(self, transfer: ReceiverTransfer, begin: m.Begin, binding: Binding) -> list[Action]:
        if transfer.peer != begin.src or transfer.offered != binding:
            names = (self._me, begin.src, *begin.key)
            return [Send(begin.src, m.Nack(*names, "another BEGIN has this name"))]
        return [self._grant(transfer)] if transfer.receiving else []

    def _for_transfer(self, message: m.Chunk | m.Commit | m.Abort, payload_bytes: int, now: float) -> list[Action]:
        transfer = self._transfers.get(message.key)
        if transfer is None or transfer.peer != message.src:
            self._counters.chunks_refused += isinstance(message, m.Chunk)
            if message.key in self._draining:
                return []  # answered once it has drained
            return [Send(message.src, self._tombstones.late(message, self._me))]
        transfer.lease_at = now + self._timers.lease_s
        self._dirty.add(message.key)
        match message:
            case m.Chunk():
                return self._guard(transfer, lambda: transfer.chunk(message, payload_bytes), now)
            case m.Commit():
                return self._guard(transfer, lambda: transfer.commit(message), now)
            case m.Abort():
                drained = m.AbortAck(*self._names(transfer), True)
                return self._abort(transfer, f"prefill worker: {message.reason}", now, drained)

    def wrote(self, key: Key, seq: int, good: bool, now: float) -> list[Action]:
        if key in self._draining:
            transfer, after = self._draining[key]
            transfer.wrote(seq, good)
            return self._free(transfer, after)
        transfer = self._transfers[key]
        before = transfer.received_bytes
        actions = self._guard(transfer, lambda: transfer.wrote(seq, good), now)
        self.credit.used(transfer.received_bytes - before)
        if transfer.live:
            self.credit.top_up(transfer)
            self._dirty.add(key)
        return actions

    def write_failed(self, key: Key, seq: int, reason: str, now: float) -> list[Action]:
        """The local pool refused a chunk: nothing a resend could mend."""
        actions = self._abort(self._transfers[key], reason, now) if key in self._transfers else []
        return actions + (self.wrote(key, seq, False, now) if key in self._draining else [])

    def acks(self) -> list[Action]:
        """One ACK for each transfer that got something since the last call."""
        dirty, self._dirty = self._dirty, set()
        live = [self._transfers[key] for key in dirty if key in self._transfers]
        return [Send(t.peer, t.ack(self._me)) for t in live if t.ack_due and t.receiving]

    # --- time

    @property
    def deadline(self) -> float:
        waits = (min(t.hold_until, t.lease_at) for t in self._transfers.values())
        return min(self._senders.deadline, self._tombstones.deadline, min(waits, default=float("inf")))

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        self._tombstones.purge(now)
        dead = self._senders.take_dead(now)
        for transfer in list(self._transfers.values()):
            if transfer.peer in dead:
                actions += self._abort(transfer, "the prefill worker is silent", now)
            elif now >= transfer.lease_at:
                actions += self._abort(transfer, "lease ran out", now)
            elif now >= transfer.hold_until:
                self._counters.refused += 1
                actions += self._stop(transfer, self._ended(transfer, "no such request here"), [], now)
        return actions

    # --- ends

    def _guard(self, transfer: ReceiverTransfer, step: Callable[[], list[Action]], now: float) -> list[Action]:
        """One step of a transfer; a contradiction ends it, COMMITTED is recorded."""
        try:
            actions = step()
        except Contradiction as why:
            return self._abort(transfer, str(why), now)
        if transfer.state is not ReceiverState.HELD:
            transfer.hold_until = float("inf")
        if transfer.state is ReceiverState.COMMITTED:
            self._counters.committed += 1
            answer = m.CommitAck(*self._names(transfer))
            self._forget(transfer, answer, now)
            actions = [*actions, Send(transfer.peer, answer)]
        return actions

    def _abort(
        self, transfer: ReceiverTransfer, reason: str, now: float, answer: m.FromReceiver | None = None
    ) -> list[Action]:
        self._counters.aborted += 1
        # Without Submit the loop has never heard of it; if Submit still comes, the tombstone answers.
        event: list[Action] = [Emit(Aborted(transfer.key, reason))] if transfer.expected is not None else []
        return self._stop(transfer, answer or self._ended(transfer, reason), event, now)

    def _stop(
        self, transfer: ReceiverTransfer, answer: m.FromReceiver, after: list[Action], now: float
    ) -> list[Action]:
        """Ends a transfer without KV. `after`, and an ABORT_ACK, wait until no copy is under way."""
        entered = transfer.stop()
        known = bool(transfer.peer)
        self._forget(transfer, answer, now)
        if known and isinstance(answer, m.AbortAck):
            after = [Send(transfer.peer, answer), *after]
        elif known:
            entered = [*entered, Send(transfer.peer, answer)]
        self._draining[transfer.key] = (transfer, after)
        return entered + self._free(transfer, after)

    def _free(self, transfer: ReceiverTransfer, after: list[Action]) -> list[Action]:
        freed = transfer.drained()
        if not freed:
            return []
        del self._draining[transfer.key]
        return [*freed, *after]

    def _forget(self, transfer: ReceiverTransfer, answer: m.FromReceiver, now: float) -> None:
        self.credit.end(transfer)
        del self._transfers[transfer.key]
        self._tombstones.bury(transfer.key, answer, now)

    def _supersede(self, key: Key, now: float) -> list[Action]:
        """A higher epoch fences every message of a lower one."""
        before = self._tombstones.seen(key)
        if before is None or before >= key[1]:
            return []
        older = self._transfers.get((key[0], before))
        return self._abort(older, f"superseded by epoch {key[1]}", now) if older else []

    def _ended(self, transfer: ReceiverTransfer, reason: str) -> m.FromReceiver:
        return (m.Abort if transfer.receiving else m.Nack)(*self._names(transfer), m.clip(reason))

    def _grant(self, transfer: ReceiverTransfer) -> Send:
        what = (transfer.have_tokens, transfer.credited_bytes, self._timers.lease_s)
        return Send(transfer.peer, m.Grant(*self._names(transfer), *what))

    def _names(self, transfer: ReceiverTransfer) -> tuple[str, str, str, int]:
        return (self._me, transfer.peer, *transfer.key)
