"""The incoming transfers that live or drain, and how each of them ends. Pure.

Owns: the one way out of every transfer: recorded answer, returned credit, the word to the sender, the event to the
loop, and waiting for a copy under way.
Must not: parse messages' meaning or decide when a transfer ends; `receiver_core.py` does.
"""

from __future__ import annotations

from collections.abc import Callable

from lanewise.transfer import messages as m
from lanewise.transfer.credit import CreditPool
from lanewise.transfer.protocol import Action, Emit, ReceiverState, Send
from lanewise.transfer.receiver_state import Contradiction, ReceiverTransfer
from lanewise.transfer.records import Aborted, Counters, Key, Limits, Timers
from lanewise.transfer.tombstones import Tombstones


class TransferTable:
    def __init__(self, me: str, timers: Timers, limits: Limits, counters: Counters) -> None:
        self.live: dict[Key, ReceiverTransfer] = {}
        self.draining: dict[Key, tuple[ReceiverTransfer, list[Action]]] = {}
        self.tombstones = Tombstones(timers.tombstone_s)
        self.credit = CreditPool(limits)
        self._me = me
        self._counters = counters

    def guard(self, transfer: ReceiverTransfer, step: Callable[[], list[Action]], now: float) -> list[Action]:
        """One step of a transfer; a contradiction ends it, COMMITTED is recorded."""
        try:
            actions = step()
        except Contradiction as why:
            return self.abort(transfer, str(why), now)
        if transfer.state is not ReceiverState.HELD:
            transfer.hold_until = float("inf")
        if transfer.state is ReceiverState.COMMITTED:
            self._counters.committed += 1
            answer = m.CommitAck(*self.names(transfer))
            self._forget(transfer, answer, now)
            actions = [*actions, Send(transfer.peer, answer)]
        return actions

    def abort(
        self, transfer: ReceiverTransfer, reason: str, now: float, answer: m.FromReceiver | None = None
    ) -> list[Action]:
        self._counters.aborted += 1
        # Without Submit the loop has never heard of it; if Submit still comes, the tombstone answers.
        event: list[Action] = [Emit(Aborted(transfer.key, reason))] if transfer.expected is not None else []
        return self.stop(transfer, answer or self.ended(transfer, reason), event, now)

    def stop(self, transfer: ReceiverTransfer, answer: m.FromReceiver, after: list[Action], now: float) -> list[Action]:
        """Ends a transfer without KV. `after`, and an ABORT_ACK, wait until no copy is under way."""
        entered = transfer.stop()
        known = bool(transfer.peer)
        self._forget(transfer, answer, now)
        if known and isinstance(answer, m.AbortAck):
            after = [Send(transfer.peer, answer), *after]
        elif known:
            entered = [*entered, Send(transfer.peer, answer)]
        self.draining[transfer.key] = (transfer, after)
        return entered + self.free(transfer, after)

    def free(self, transfer: ReceiverTransfer, after: list[Action]) -> list[Action]:
        freed = transfer.drained()
        if not freed:
            return []
        del self.draining[transfer.key]
        return [*freed, *after]

    def _forget(self, transfer: ReceiverTransfer, answer: m.FromReceiver, now: float) -> None:
        self.credit.end(transfer)
        del self.live[transfer.key]
        self.tombstones.bury(transfer.key, answer, now, transfer.mac_key)

    def supersede(self, key: Key, now: float) -> list[Action]:
        """A higher epoch fences every message of a lower one."""
        before = self.tombstones.seen(key)
        if before is None or before >= key[1]:
            return []
        older = self.live.get((key[0], before))
        return self.abort(older, f"superseded by epoch {key[1]}", now) if older else []

    def ended(self, transfer: ReceiverTransfer, reason: str) -> m.FromReceiver:
        return (m.Abort if transfer.receiving else m.Nack)(*self.names(transfer), m.clip(reason))

    def names(self, transfer: ReceiverTransfer) -> tuple[str, str, str, int]:
        return (self._me, transfer.peer, *transfer.key)
