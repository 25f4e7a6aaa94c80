"""All links and outgoing transfers of one prefill worker. Pure: messages, commands and time in, actions out.

Owns: which transfer a message belongs to, which transfer sends next, and what ends when a link ends.
Must not: touch pages or sockets.
"""

from __future__ import annotations

from collections.abc import Callable

from lanewise.request import Token
from lanewise.transfer import messages as m
from lanewise.transfer.farewells import Farewells, LinkId
from lanewise.transfer.link_state import LinkMachine
from lanewise.transfer.protocol import Action, Disconnect, Emit, LinkPhase, Send
from lanewise.transfer.records import Aborted, Binding, Counters, Endpoint, Key, Limits, Pages, Peer, Timers
from lanewise.transfer.send_window import Job
from lanewise.transfer.sender_state import SenderTransfer

_KNOWN_ENDS = (m.Nack, m.Abort)  # the receiver need not be told of an end that it has told
_FAIR_EVERY = 4
"""The transfer with the least left goes first, but every n-th chunk is the oldest transfer's, so none starves."""


class SenderCore:
    def __init__(
        self,
        identity: Endpoint,
        timers: Timers,
        limits: Limits,
        counters: Counters,
        mac_key: Callable[[], bytes] = bytes,
        head_shards: int = 1,
    ) -> None:
        """`mac_key` draws the key of each transfer; empty keys where its chunks need no MAC. `head_shards`: as of the
        pool."""
        self._mac_key = mac_key
        self._head_shards = head_shards
        self._identity = identity
        self._timers = timers
        self._shortest_s = timers.shortest_s
        self._limits = limits
        self._counters = counters
        self._links: dict[LinkId, LinkMachine] = {}
        self._transfers: dict[Key, SenderTransfer] = {}
        self._by_address: dict[str, dict[Key, SenderTransfer]] = {}
        self._farewells = Farewells(timers)
        self._turn = 0
        self._look_at = 0.0

    @property
    def idle(self) -> bool:
        return not self._transfers and self._farewells.idle

    @property
    def live(self) -> int:
        return len(self._transfers)

    # --- the loop's side

    def connect(self, peer: Peer, now: float) -> list[Action]:
        return self._link(peer).connect(now)

    def begin(self, key: Key, peer: Peer, binding: Binding, pages: Pages, now: float) -> list[Action]:
        if key in self._transfers:
            return []  # the same attempt twice: the first one stands
        link = self._link(peer)
        mine, shards = self._identity, self._head_shards
        transfer = SenderTransfer(key, peer, binding, pages, identity=mine, timers=self._timers, head_shards=shards)
        transfer.mac_key = self._mac_key()
        self._transfers[key] = transfer
        self._by_address.setdefault(peer.kv_address, {})[key] = transfer
        actions = link.want(now)
        if link.usable:
            actions += transfer.link_up(now)
        return actions

    def ready(self, key: Key, tokens: int, layers: range | None) -> None:
        if transfer := self._transfers.get(key):
            transfer.ready(tokens, layers)

    def commit(self, key: Key, token: Token, now: float) -> list[Action]:
        transfer = self._transfers.get(key)
        return self._finish(transfer, transfer.commit(token, now), now) if transfer else []

    def abort(self, key: Key, reason: str, now: float) -> list[Action]:
        transfer = self._transfers.get(key)
        return self._finish(transfer, transfer.fail(reason), now) if transfer else []

    def abort_all(self, reason: str, now: float) -> list[Action]:
        return [action for key in list(self._transfers) for action in self.abort(key, reason, now)]

    def measured(self, address: str, partner: str, num_bytes: int, seconds: float) -> list[Action]:
        """So long takes a block by the way that data goes to this partner."""
        link = self._links.get((address, partner))
        return link.measured(num_bytes, seconds) if link else []

    def unreachable(self, address: str, reason: str, now: float) -> list[Action]:
        """The address cannot even be tried."""
        return [
            action
            for link_id, link in list(self._links.items())
            if link_id[0] == address
            for action in self._around(link_id, link, link.fail(reason, now, hopeless=True), now)
        ]

    # --- chunks

    def next_chunk(self, address: str, *, refer: bool = False) -> tuple[SenderTransfer, Job] | None:
        """What to send to this address, now that something can take a message. `refer`: only its place is sent."""
        ready = self._with_chunk(address, refer)
        if not ready:
            return None
        self._turn += 1
        oldest = self._turn % _FAIR_EVERY == 0
        chosen = ready[0] if oldest else min(ready, key=lambda transfer: transfer.window.remaining_bytes)
        job = chosen.take(self._most(chosen, refer))
        assert job is not None
        return chosen, job

    def _with_chunk(self, address: str, refer: bool) -> list[SenderTransfer]:
        return [
            transfer
            for transfer in self._by_address.get(address, {}).values()
            if transfer.streaming and transfer.window.wants(self._most(transfer, refer))
        ]

    def _most(self, transfer: SenderTransfer, refer: bool) -> int:
        """Bytes of its next chunk."""
        link = self._links[transfer.peer.kv_address, transfer.peer.incarnation]
        whole = self._head_shards == 1  # of several processes' heads most are gathered after all
        return link.referred_bytes if refer and whole else link.chunk_bytes

    def unacked_bytes(self, address: str) -> int:
        """Of all transfers to this address: handed to the network and not known to be in place."""
        return sum(transfer.window.unacked_bytes for transfer in self._by_address.get(address, {}).values())

    def sent(self, transfer: SenderTransfer, job: Job, crc: bytes, delivered: bool, now: float) -> list[Action]:
        return self._finish(transfer, transfer.sent(job, crc, delivered, now), now)

    def resend(self, address: str) -> None:
        """What this address has not acknowledged may be lost."""
        for transfer in self._by_address.get(address, {}).values():
            if transfer.streaming:
                transfer.window.resend_all()

    # --- messages

    def receive(self, address: str, message: m.AnyMessage, now: float) -> list[Action]:
        if message.dst != self._identity.incarnation:
            self._counters.stale += 1
            return []
        if isinstance(message, m.Stale):
            return self._stale((address, message.wanted), now)
        link_id = (address, message.src)
        link = self._links.get(link_id)
        if link is None:
            return []
        actions = self._around(link_id, link, link.receive(message, now), now)
        if isinstance(message, m.Pong):
            actions += self._pong(link_id, message, now)
        elif isinstance(message, m.TransferMessage):
            actions += self._for_transfer(link_id, link, message, now)
        return actions

    def _for_transfer(self, link_id: LinkId, link: LinkMachine, message: m.TransferMessage, now: float) -> list[Action]:
        actions: list[Action] = []
        if isinstance(message, m.AbortAck):
            self._farewells.heard(link_id, message.key)
            return actions
        if isinstance(message, m.Abort):
            actions.append(self._send(link_id, m.AbortAck(*self._names(link_id), *message.key, True)))
        transfer = self._transfers.get(message.key)
        if transfer is None or transfer.peer.incarnation != message.src:
            if isinstance(message, m.Grant):  # of a transfer that has ended here: our ABORT was lost
                actions.append(self._send(link_id, m.Abort(*self._names(link_id), *message.key, "ended")))
            return actions
        actions += self._finish(
            transfer, transfer.receive(message, now), now, tell=not isinstance(message, _KNOWN_ENDS)
        )
        if isinstance(message, m.Nack) and message.hello_first:
            actions += self._around(link_id, link, link.again(now), now)
        return actions

    def _pong(self, link_id: LinkId, pong: m.Pong, now: float) -> list[Action]:
        for key in pong.live:
            if (transfer := self._transfers.get(key)) and transfer.peer.incarnation == pong.src:
                transfer.renew(now)
        return []

    def _stale(self, link_id: LinkId, now: float) -> list[Action]:
        link = self._links.get(link_id)
        if link is None:
            return []
        self._counters.stale += 1
        return self._around(link_id, link, link.fail("stale incarnation", now, hopeless=True), now)

    # --- time

    @property
    def deadline(self) -> float:
        """When `tick` has something to do, or a little earlier: see `ReceiverCore.deadline`."""
        return self._look_at

    def tick(self, now: float) -> list[Action]:
        if now < self._look_at:
            return []
        actions = self._expire(now)
        links = (link.deadline for link in self._links.values())
        transfers = (transfer.deadline for transfer in self._transfers.values())
        self._look_at = min((*links, *transfers, self._farewells.deadline, now + self._shortest_s))
        return actions

    def _expire(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for transfer in list(self._transfers.values()):
            actions += self._finish(transfer, transfer.tick(now), now)
        for link_id, link in list(self._links.items()):
            actions += self._around(link_id, link, link.tick(now), now)
            if link.ping_due(now):
                actions.append(self._ping(link_id))
            if link.forgettable(now) and not self._uses(link_id):
                actions += self._forget(link_id)
        return actions + self._farewells.tick(now)

    def _ping(self, link_id: LinkId) -> Action:
        live = [key for key, transfer in self._of(link_id) if transfer.streaming][: m.MAX_LIVE]
        return self._send(link_id, m.Ping(*self._names(link_id), tuple(live)))

    # --- what follows from a machine's actions

    def _around(self, link_id: LinkId, link: LinkMachine, actions: list[Action], now: float) -> list[Action]:
        """A link's own actions, then those of its transfers: they start when it is usable and end when it fails."""
        if not actions:
            return actions
        out = list(actions)
        if link.usable:
            for _, transfer in self._of(link_id):
                out += self._finish(transfer, transfer.link_up(now), now)
        elif link.phase is LinkPhase.FAILED:
            for _, transfer in self._of(link_id):
                out += self._finish(transfer, transfer.fail(link.reason, link.mismatch), now)
            self._farewells.forget(link_id)
        return out

    def _finish(
        self, transfer: SenderTransfer, actions: list[Action], now: float, *, tell: bool = True
    ) -> list[Action]:
        """Counts and forgets a transfer that has ended, and tells the receiver of an abort it cannot know of."""
        if not actions or not transfer.ended or transfer.key not in self._transfers:
            return actions
        link_id = (transfer.peer.kv_address, transfer.peer.incarnation)
        del self._transfers[transfer.key]
        del self._by_address[transfer.peer.kv_address][transfer.key]
        self._counters.prefix_skipped_tokens += transfer.have_tokens
        if (reason := _abort_reason(actions)) is not None and tell and self._links[link_id].usable:
            return [*actions, self._tell(link_id, transfer.key, reason, now)]
        return actions

    def _tell(self, link_id: LinkId, key: Key, reason: str, now: float) -> Action:
        return self._farewells.say(link_id, m.Abort(*self._names(link_id), *key, m.clip(reason)), now)

    def _link(self, peer: Peer) -> LinkMachine:
        link_id = (peer.kv_address, peer.incarnation)
        if link_id not in self._links:
            self._links[link_id] = LinkMachine(peer, self._identity, self._timers, self._limits)
        return self._links[link_id]

    def _forget(self, link_id: LinkId) -> list[Action]:
        del self._links[link_id]
        self._farewells.forget(link_id)
        address = link_id[0]
        if any(other == address for other, _ in self._links):
            return []
        self._by_address.pop(address, None)
        return [Disconnect(address)]

    def _of(self, link_id: LinkId) -> list[tuple[Key, SenderTransfer]]:
        address, incarnation = link_id
        group = self._by_address.get(address, {})
        return [(key, transfer) for key, transfer in group.items() if transfer.peer.incarnation == incarnation]

    def _uses(self, link_id: LinkId) -> bool:
        return bool(self._of(link_id))

    def _names(self, link_id: LinkId) -> tuple[str, str]:
        return self._identity.incarnation, link_id[1]

    def _send(self, link_id: LinkId, message: m.AnyMessage) -> Send:
        return Send(link_id[0], message)


def _abort_reason(actions: list[Action]) -> str | None:
    for action in actions:
        if isinstance(action, Emit) and isinstance(action.event, Aborted):
            return action.event.reason
    return None
