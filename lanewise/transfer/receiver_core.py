"""All incoming transfers of one decode worker. Pure: messages, commands and time in, actions out.

Owns: which transfer a message or command concerns, and when a transfer must end.
Must not: touch page bytes or sockets. How a transfer ends is `transfer_table.py`.
"""

from __future__ import annotations

from lanewise.transfer import messages as m
from lanewise.transfer.known_senders import KnownSenders
from lanewise.transfer.protocol import Action, Emit, ReceiverState, Send
from lanewise.transfer.receiver_state import ReceiverTransfer
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
from lanewise.transfer.transfer_table import TransferTable

_BUSY_RETRY_S = 0.5


class ReceiverCore:
    def __init__(
        self, identity: Endpoint, timers: Timers, limits: Limits, counters: Counters, *, bound: bool = True
    ) -> None:
        self._me = identity.incarnation
        self._layout = identity.layout
        self._bound = bound
        self._timers = timers
        self._shortest_s = timers.shortest_s
        self._limits = limits
        self._counters = counters
        self._senders = KnownSenders(identity, timers, limits)
        self.table = TransferTable(identity.incarnation, timers, limits, counters)
        self._look_at = 0.0
        self._dirty: set[Key] = set()
        self._unheard: set[Key] = set()  # closing: aborted, and the sender has not said that it knows

    @property
    def incarnation(self) -> str:
        return self._me

    @property
    def live(self) -> int:
        return len(self.table.live)

    @property
    def idle(self) -> bool:
        return not self.table.live and not self._unheard

    # --- the loop's side

    def expect(self, key: Key, binding: Binding, now: float) -> list[Action]:
        if self.table.tombstones.fences(key):
            return [Emit(Aborted(key, "stale epoch"))]
        if (answer := self.table.tombstones.answer(key)) is not None:
            return [Emit(Aborted(key, getattr(answer, "reason", "this attempt has already ended")))]
        actions = self.table.supersede(key, now)
        transfer = self.table.live.setdefault(key, ReceiverTransfer(key, self._layout, bound=self._bound))
        if transfer.expected is not None:
            return actions  # the same Submit twice: the first one stands
        return actions + self.table.guard(transfer, lambda: transfer.expect(binding), now)

    def grant(self, key: Key, pages: Pages, have_tokens: int, now: float) -> list[Action]:
        transfer = self.table.live.get(key)
        if transfer is None or transfer.state is not ReceiverState.OFFERED:
            return []  # it ended meanwhile and the loop has been told
        actions = self.table.guard(transfer, lambda: transfer.grant(pages, have_tokens), now)
        if transfer.live:
            self.table.credit.top_up(transfer)
            self._counters.prefix_skipped_tokens += have_tokens
            actions.append(self._grant(transfer))
        return actions

    def refuse(self, key: Key, busy: bool, reason: str, retry_after_s: float, now: float) -> list[Action]:
        transfer = self.table.live.get(key)
        if transfer is None or transfer.state is not ReceiverState.OFFERED:
            return []
        answer: m.FromReceiver = m.Nack(*self.table.names(transfer), m.clip(reason))
        if busy:
            answer = m.BusyReply(*self.table.names(transfer), min(max(retry_after_s, 0.0), m.MAX_WAIT_S))
        self._counters.busy += busy
        self._counters.refused += not busy
        return self.table.stop(transfer, answer, [], now)

    def cancel(self, key: Key, reason: str, now: float) -> list[Action]:
        """Drained follows in every case, so that the loop needs no case of its own."""
        self._counters.drained += 1
        drained = Emit(Drained(key))
        if key in self.table.draining:
            self.table.draining[key][1].append(drained)
            return []
        transfer = self.table.live.get(key)
        if transfer is None:
            return [drained]
        return self.table.stop(transfer, self.table.ended(transfer, f"cancelled: {reason}"), [drained], now)

    def abort_all(self, reason: str, now: float) -> list[Action]:
        """At close. Senders must acknowledge: what a socket has not read when its connection ends is lost."""
        actions: list[Action] = []
        for key, transfer in list(self.table.live.items()):
            if transfer.peer:
                self._unheard.add(key)
            actions += self.table.abort(transfer, reason, now, m.Abort(*self.table.names(transfer), m.clip(reason)))
        return actions

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
            case m.AbortAck():
                self._unheard.discard(message.key)
                return []
            case _:
                return []

    def _ping(self, ping: m.Ping, now: float) -> Action:
        known = []
        for key in ping.live:
            transfer = self.table.live.get(key)
            if transfer is not None and transfer.peer == ping.src:
                transfer.lease_at = now + self._timers.lease_s
                known.append(key)
        return Send(ping.src, m.Pong(self._me, ping.src, tuple(known), ping.src not in self._senders))

    def _begin(self, begin: m.Begin, now: float) -> list[Action]:
        key = begin.key
        names = (self._me, begin.src, *key)
        transfer = self.table.live.get(key)
        binding = Binding(begin.tokens, begin.chain, begin.prompt)
        if begin.src not in self._senders:
            return [Send(begin.src, m.Nack(*names, "HELLO first", True))]
        if (answer := self.table.tombstones.answer(key, begin.src)) is not None:
            return [Send(begin.src, answer)]
        if self.table.tombstones.fences(key):
            return [Send(begin.src, m.Nack(*names, "stale epoch"))]
        if transfer is not None and transfer.peer:
            return self._begin_again(transfer, begin, binding)
        if transfer is None and self._full:
            return [Send(begin.src, m.BusyReply(*names, _BUSY_RETRY_S))]
        actions = self.table.supersede(key, now)
        if transfer is None:
            transfer = self.table.live[key] = ReceiverTransfer(key, self._layout, bound=self._bound)
            transfer.hold_until = now + self._timers.hold_begin_s
        transfer.lease_at = now + self._timers.lease_s
        transfer.mac_key = begin.mac_key
        fresh = transfer
        return actions + self.table.guard(fresh, lambda: fresh.begin(begin.src, binding), now)

    @property
    def _full(self) -> bool:
        held = sum(transfer.state is ReceiverState.HELD for transfer in self.table.live.values())
        return held >= self._limits.max_held or self.live >= self._limits.max_transfers

    def _begin_again(self, transfer: ReceiverTransfer, begin: m.Begin, binding: Binding) -> list[Action]:
        if transfer.peer != begin.src or transfer.offered != binding:
            names = (self._me, begin.src, *begin.key)
            return [Send(begin.src, m.Nack(*names, "another BEGIN has this name"))]
        return [self._grant(transfer)] if transfer.receiving else []

    def _for_transfer(self, message: m.Chunk | m.Commit | m.Abort, payload_bytes: int, now: float) -> list[Action]:
        transfer = self.table.live.get(message.key)
        if transfer is None or transfer.peer != message.src:
            self._counters.chunks_refused += isinstance(message, m.Chunk)
            if message.key in self.table.draining:
                return []  # answered once it has drained
            return [Send(message.src, self.table.tombstones.late(message, self._me))]
        transfer.lease_at = now + self._timers.lease_s
        self._dirty.add(message.key)
        match message:
            case m.Chunk():
                return self.table.guard(transfer, lambda: transfer.chunk(message, payload_bytes), now)
            case m.Commit():
                return self.table.guard(transfer, lambda: transfer.commit(message), now)
            case m.Abort():
                drained = m.AbortAck(*self.table.names(transfer), True)
                return self.table.abort(transfer, f"prefill worker: {message.reason}", now, drained)

    def mac_key(self, key: Key) -> bytes:
        """Of a transfer that lives or has ended lately; empty where there is none."""
        transfer = self.table.live.get(key)
        return transfer.mac_key if transfer else self.table.tombstones.mac_key(key)

    def draining(self, key: Key) -> bool:
        """Whether a transfer that ends waits for a copy under way."""
        return key in self.table.draining

    def wrote(self, key: Key, seq: int, good: bool, now: float, *, spoiled: bool = False) -> list[Action]:
        """The copy of a chunk ended; `spoiled`: its pages hold bytes of a copy that was not `good`."""
        if key in self.table.draining:
            transfer, after = self.table.draining[key]
            transfer.wrote(seq, good)
            return self.table.free(transfer, after)
        transfer = self.table.live[key]
        before = transfer.received_bytes
        actions = self.table.guard(transfer, lambda: transfer.wrote(seq, good, spoiled), now)
        self.table.credit.used(transfer.received_bytes - before)
        if transfer.live:
            self.table.credit.top_up(transfer)
            self._dirty.add(key)
        return actions

    def write_failed(self, key: Key, seq: int, reason: str, now: float) -> list[Action]:
        """The local pool refused a chunk: nothing a resend could mend."""
        actions = self.table.abort(self.table.live[key], reason, now) if key in self.table.live else []
        return actions + (self.wrote(key, seq, False, now) if key in self.table.draining else [])

    def acks(self) -> list[Action]:
        """One ACK for each transfer that got something since the last call."""
        dirty, self._dirty = self._dirty, set()
        live = [self.table.live[key] for key in dirty if key in self.table.live]
        return [Send(t.peer, t.ack(self._me)) for t in live if t.ack_due and t.receiving]

    # --- time

    @property
    def deadline(self) -> float:
        """When `tick` has something to do, or a little earlier. Asked for after every message, so it is not searched
        for then: what has begun to wait since the last search cannot be over before the shortest wait is."""
        return self._look_at

    def tick(self, now: float) -> list[Action]:
        if now < self._look_at:
            return []
        actions = self._expire(now)
        waits = (min(t.hold_until, t.lease_at) for t in self.table.live.values())
        ends = min(self._senders.deadline, self.table.tombstones.deadline, min(waits, default=float("inf")))
        self._look_at = min(ends, now + self._shortest_s)
        return actions

    def _expire(self, now: float) -> list[Action]:
        actions: list[Action] = []
        self.table.tombstones.purge(now)
        dead = self._senders.take_dead(now)
        for transfer in list(self.table.live.values()):
            if transfer.peer in dead:
                actions += self.table.abort(transfer, "the prefill worker is silent", now)
            elif now >= transfer.lease_at:
                actions += self.table.abort(transfer, "lease ran out", now)
            elif now >= transfer.hold_until:
                self._counters.refused += 1
                actions += self.table.stop(transfer, self.table.ended(transfer, "no such request here"), [], now)
        return actions

    def _grant(self, transfer: ReceiverTransfer) -> Send:
        what = (transfer.have_tokens, transfer.credited_bytes, self._timers.lease_s)
        return Send(transfer.peer, m.Grant(*self.table.names(transfer), *what))
