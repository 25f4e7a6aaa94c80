"""The prefill side of the KV channel: its sockets and messages.

Owns: the DEALER sockets, per decode address one for control and one per data stripe.
Must not: decide anything about a transfer (`sender_core.py` does), or touch the bytes of chunks (`pump.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import zmq
from msgspec.structs import replace as replace_fields

from lanewise.errors import ConfigError
from lanewise.transfer import ipc_link, mac
from lanewise.transfer import messages as m
from lanewise.transfer.bundles import MESSAGES_PER_TURN, apart, receive, send_now, send_queued
from lanewise.transfer.dealers import Connection, open_connection, open_data, writable
from lanewise.transfer.faults import Faults, Frames, is_loopback
from lanewise.transfer.keys import Security
from lanewise.transfer.outlets import Outlets
from lanewise.transfer.protocol import Action, Disconnect, Emit, Entered, Send, SendProbe
from lanewise.transfer.pump import Pump
from lanewise.transfer.records import (
    Aborted,
    Binding,
    Busy,
    Counters,
    Delivered,
    Endpoint,
    Key,
    Limits,
    Pages,
    PageStore,
    Peer,
    SenderEvent,
    Timers,
)
from lanewise.transfer.sender_core import SenderCore
from lanewise.transfer.trial import References
from lanewise.transfer.ways import Ways
from lanewise.transfer.zmq_link import SocketThread, log


class SenderThread(SocketThread):
    def __init__(
        self,
        identity: Endpoint,
        store: PageStore,
        on_event: Callable[[SenderEvent], None],
        faults: Faults | None,
        timers: Timers,
        limits: Limits,
        security: Security,
    ) -> None:
        limits = ipc_link.fitting(limits, store)
        super().__init__("kv-sender", limits, Counters(), faults)
        self._store = store
        self._security = security
        mac_key = mac.new_key if security.macs else bytes
        self.core = SenderCore(identity, timers, limits, self.counters, mac_key, store.head_shards)
        self._incarnation = identity.incarnation
        self._on_event = on_event
        self._connections: dict[str, Connection] = {}
        self._by_socket: dict[zmq.Socket[bytes], Connection] = {}
        self._ways = Ways(store, identity.layout, limits, self.faults)
        self._pump = Pump(self, self._ways)

    def use_direct(self, references: References) -> None:
        """Data goes by plain TCP connections where the partner takes them; before the thread starts."""
        if references is not References.NEVER:
            self._ways.device = ipc_link.checked(self._store.device_memory)
            if references is References.ALWAYS and self._store.device_memory and not self._ways.device:
                raise ConfigError("channel IPC: this GPU cannot be relied on; expected Auto or ZeroMQ")
        self._ways.outlets = Outlets(self._incarnation, self, references, self._ways.device)

    # --- of direct connections

    def broken(self, address: str) -> None:
        self.core.resend(address)

    def probe_sockets(self, address: str, frames: Frames) -> None:
        if connection := self._connections.get(address):
            connection.probes[0] = frames
            self._flush(connection)

    def measured(self, address: str, partner: str, num_bytes: int, seconds: float) -> None:
        self.perform(self.core.measured(address, partner, num_bytes, seconds), time.monotonic())

    def impossible(self, address: str, reason: str) -> None:
        log.error("channel IPC to %s is impossible: %s", address, reason)
        if self._ways.outlets:
            self._ways.outlets.forget(address)  # whoever asks for this link again is to hear it again
        now = time.monotonic()
        self.perform(self.core.unreachable(address, f"channel IPC: {reason}", now), now)

    # --- process groups

    def use_groups(self, host: str, device: str) -> None:
        """Data goes through process groups where the partner has them too; before the thread starts."""
        port = self._ways.use_groups(self._incarnation, host, self.core.resend, device)
        self.watch(port.socket, zmq.POLLIN, self._on_groups)

    def _on_groups(self, _now: float) -> None:
        if groups := self._ways.groups:
            groups.port.on_readable()
            if not groups.port.alive:
                self.unwatch(groups.port.socket)
                groups.port.close()
                self._ways.groups = None

    def check(self, peer: Peer) -> None:
        if self.faults.active and not is_loopback(peer.kv_address):
            raise ConfigError(f"faults are on, and {peer.kv_address} is not loopback")

    def begin(self, key: Key, peer: Peer, binding: Binding, pages: Pages, now: float) -> None:
        if self.closing:
            self._emit(Aborted(key, "the prefill worker is closing"))
            return
        self.perform(self.core.begin(key, peer, binding, pages, now), now)

    # --- SocketThread

    def on_close(self, now: float) -> None:
        self.perform(self.core.abort_all("the prefill worker is closing", now), now)

    def may_stop(self) -> bool:
        return self.core.idle

    def close_sockets(self) -> None:
        self._ways.close()
        super().close_sockets()

    def next_deadline(self, now: float) -> float:
        return now if self._pump.backlog else self.core.deadline

    def on_readable(self, sock: zmq.Socket[bytes], now: float) -> None:
        connection = self._by_socket.get(sock)
        if connection is None:
            return
        heard = 0
        while heard < MESSAGES_PER_TURN:
            try:
                frames = receive(sock)
            except zmq.Again:
                return
            try:
                for message, _ in apart(frames):
                    self._hear(connection, message, now)
                    heard += 1
            except m.MalformedMessage:
                self.counters.malformed += 1
                heard += 1

    def _hear(self, connection: Connection, message: m.AnyMessage, now: float) -> None:
        if isinstance(message, m.ProbeAck) and self._ways.outlets:
            self._ways.outlets.proved(connection.address, message, time.monotonic())
        if isinstance(message, m.HelloAck):
            message = self._open_data(connection, message)
            if self._ways.outlets:
                self._ways.outlets.greeted(connection.address, message, now)
            if self._ways.groups and (join := self._ways.groups.greeted(connection.address, message)):
                self._send(Send(connection.address, join), now)
        self.perform(self.core.receive(connection.address, message, now), now)

    def on_turn(self, now: float) -> None:
        self.perform(self.core.tick(now), now)
        self._pump.backlog = False
        if self._ways.outlets:
            self._ways.outlets.tick(now)
        for address, join in self._ways.groups.due(now) if self._ways.groups else ():
            self._send(Send(address, join), now)
        for connection in list(self._connections.values()):
            self._flush(connection)  # before chunks are read and checksummed: meanwhile the partner grants the next
            blocked = self._pump.turn(connection, now)
            self._flush(connection)
            self._watch(connection, blocked=blocked)
        if self._ways.outlets:
            self._ways.outlets.flush(now)

    # --- actions

    def perform(self, actions: list[Action], now: float) -> None:
        for action in actions:
            match action:
                case Send():
                    self._send(action, now)
                case SendProbe():
                    frames: Frames = [m.encode(action.probe), action.payload]
                    if connection := self._connection(action.to, now):
                        connection.probes[action.stripe] = frames
                case Emit():
                    self._emit(action.event)  # type: ignore[arg-type]
                case Entered():
                    self.faults.point(action.point)
                case Disconnect():
                    self._disconnect(action.address)
                case _:
                    raise TypeError(f"not an action of a sender: {action}")

    def _emit(self, event: SenderEvent) -> None:
        if isinstance(event, Delivered | Busy | Aborted):
            self._ways.release(event.key)
            self.counters.delivered += isinstance(event, Delivered)
            self.counters.busy += isinstance(event, Busy)
            self.counters.aborted += isinstance(event, Aborted)
        self._guarded(self._on_event, event)

    def _send(self, send: Send, now: float) -> None:
        connection = self._connection(send.to, now)
        if connection is None:
            return
        message = send.message

        def post(frames: Frames) -> None:
            behind = isinstance(message, m.Commit) and self._ways.commit(send.to, message.key, frames[0], now)
            if not behind:
                self._queue(connection, frames)

        self.deliver(m.kind(message), [m.encode(message)], post)

    def _queue(self, connection: Connection, frames: Frames) -> None:
        if len(connection.outbox) >= self.limits.queue_messages:
            self.counters.dropped += 1
            return
        connection.outbox.append(frames)
        if self.faults.active:  # a message that is said to have left has
            self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        send_queued(connection.control, connection.outbox, self.most_together)
        for stripe, frames in list(connection.probes.items()):
            if stripe < len(connection.data) and writable(sock := connection.data[stripe]):
                del connection.probes[stripe]
                self.deliver("PROBE", frames, lambda out, sock=sock: _ignore(send_now(sock, out)))  # type: ignore[misc]

    # --- connections

    def _connection(self, address: str, now: float) -> Connection | None:
        connection = self._connections.get(address)
        if connection is None:
            try:
                connection = open_connection(self.context, address, self._incarnation, self.limits, self._security)
            except (zmq.ZMQError, ConfigError) as error:
                self.perform(self.core.unreachable(address, f"cannot connect to {address!r}: {error}", now), now)
                return None
            self.poller.register(connection.control, zmq.POLLIN)
            self._connections[address] = connection
            self._by_socket[connection.control] = connection
        return connection

    def _open_data(self, connection: Connection, ack: m.HelloAck) -> m.HelloAck:
        """Connects to where the partner takes data; where the two sides protect it differently, that is a refusal."""
        if ack.dst != self._incarnation or ack.refusal:
            return ack
        if self._security.macs is not bool(ack.data_port):
            theirs = "data beside control" if ack.data_port else "data with control"
            return replace_fields(ack, refusal=f"encryption: {self._security.encryption} here, {theirs} there")
        where = (ack.data_port, ack.data_token)
        if self._security.macs and connection.data_at != where:
            self._close(connection.data)
            connection.data_at = where
            connection.data = open_data(self.context, connection.address, *where, self._incarnation, self.limits)
        return ack

    def _close(self, sockets: list[zmq.Socket[bytes]]) -> None:
        for sock in sockets:
            if sock in self.poller:
                self.poller.unregister(sock)
            self._by_socket.pop(sock, None)
            sock.close(linger=0)

    def _watch(self, connection: Connection, *, blocked: bool) -> None:
        """Asks the poller for exactly what is waited for; POLLOUT without need would spin."""
        if bool(connection.outbox) is not connection.control_stuck:
            connection.control_stuck = bool(connection.outbox)
            self.poller.modify(connection.control, zmq.POLLIN | (zmq.POLLOUT if connection.outbox else 0))
        for stripe, sock in enumerate(connection.data):
            waits = (blocked or stripe in connection.probes) and not writable(sock)
            if waits and sock not in self.poller:
                self.poller.register(sock, zmq.POLLOUT)
            elif not waits and sock in self.poller:
                self.poller.unregister(sock)

    def _disconnect(self, address: str) -> None:
        self._ways.forget(address)
        connection = self._connections.pop(address, None)
        if connection is None:
            return
        self._close([connection.control, *connection.data])


def _ignore(_: bool) -> None:
    """A test block that found no room: its timer sends it again."""
