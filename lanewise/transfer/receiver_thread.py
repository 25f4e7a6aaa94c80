"""The decode side of the KV channel: takes chunks off the ROUTER, checks them, puts them into pages.

Owns: the ROUTER sockets and the writing of chunks that came as a whole, copied once, from the network's buffer into
the pool. Must not: decide anything about a transfer; `receiver_core.py` does.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable

import zmq
from msgspec.structs import replace as replace_fields

from lanewise.errors import ConfigError
from lanewise.transfer import mac
from lanewise.transfer import messages as m
from lanewise.transfer.authors import Authors
from lanewise.transfer.bundles import EMPTY, MESSAGES_PER_TURN, apart, receive, send_queued
from lanewise.transfer.encoding import Encoding
from lanewise.transfer.faults import Faults, Frames, is_loopback
from lanewise.transfer.gate import Gate
from lanewise.transfer.groups import ReceiverGroups
from lanewise.transfer.inlets import Inlets
from lanewise.transfer.keys import Security
from lanewise.transfer.protocol import Action, Emit, Entered, Send, Write
from lanewise.transfer.receiver_core import ReceiverCore
from lanewise.transfer.records import (
    Aborted,
    Binding,
    Counters,
    Endpoint,
    Key,
    Limits,
    PageStore,
    ReceiverEvent,
    Timers,
)
from lanewise.transfer.zmq_link import SocketThread, log, make_router

_BYTES_PER_TURN = 4 << 20  # then ACKs go out, and commands and timers have their turn
_RETRY_S = 0.01


class ReceiverThread(SocketThread):
    def __init__(
        self,
        identity: Endpoint,
        store: PageStore,
        on_event: Callable[[ReceiverEvent], None],
        faults: Faults | None,
        timers: Timers,
        limits: Limits,
        security: Security,
    ) -> None:
        super().__init__("kv-receiver", limits, Counters(), faults)
        self._security = security
        self._gate: Gate | None = None
        self._groups: ReceiverGroups | None = None
        self._inlets: Inlets | None = None
        self._data: zmq.Socket[bytes] | None = None  # where data has a socket of its own
        self._data_port = 0
        self.core = ReceiverCore(identity, timers, limits, self.counters, bound=not self.faults.unbound)
        self._layout = identity.layout
        self._encoding = Encoding.of(identity.layout)
        self._store = store
        self._on_event = on_event
        self._authors = Authors(security.macs)
        self._outboxes: dict[str, deque[Frames]] = {}  # until the end of the turn, or until the connection has room

    def bind(self, listen: str, data_listen: str) -> str:
        if self.faults.active and not is_loopback(listen):
            self.release()
            raise ConfigError(f"faults are on, and {listen} is not loopback")
        try:
            if self._security.on:
                self._gate = Gate(self.context, self._security, self.limits.max_handshakes, self.counters)
            self._router, endpoint = self._open(listen, data=False)
            if self._security.macs:
                self._data, bound = self._open(data_listen or _next_port(listen), data=True)
                self._data_port = int(bound.rpartition(":")[2])
            for sock in self._gate.sockets if self._gate else []:
                self.poller.register(sock, zmq.POLLIN)
        except ConfigError:
            self.release()
            raise
        return endpoint

    def _open(self, listen: str, *, data: bool) -> tuple[zmq.Socket[bytes], str]:
        """A bound socket and its endpoint with the real port."""
        sock = make_router(self.context, listen, self.limits)
        if self._gate:
            self._gate.protect(sock, data=data)
        try:
            sock.bind(listen)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {listen!r}: {error}") from None
        self.poller.register(sock, zmq.POLLIN)
        return sock, bytes(sock.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")

    def use_groups(self, host: str, device: str) -> None:
        """Takes data by process groups too; waits until partners can meet here. Before the thread starts."""
        self._groups = ReceiverGroups(host, self.limits.max_chunk_bytes, self._on_group_chunk, device)
        try:
            self._groups.wait()
        except ConfigError:
            self.release()
            raise
        self.watch(self._groups.port.socket, zmq.POLLIN, self._on_groups)

    def use_direct(self, listen: str) -> None:
        """Takes data by plain TCP connections too, where nothing is encrypted. Before the thread starts."""
        try:
            self._inlets = Inlets(listen, self._store, self._layout, self)
        except ConfigError as error:
            log.warning("no direct connections: %s; ZeroMQ carries all", error)

    def _on_groups(self, _now: float) -> None:
        if self._groups:
            self._groups.port.on_readable()
            if not self._groups.port.alive:
                self.unwatch(self._groups.port.socket)
                self._groups.port.close()
                self._groups = None

    def _on_group_chunk(self, sender: str, header: bytes, payload: memoryview) -> None:
        try:
            message = m.decode(header)
        except m.MalformedMessage:
            self.counters.malformed += 1
            return
        if not isinstance(message, m.Chunk) or message.src != sender:
            self.counters.malformed += 1
            return
        now = time.monotonic()
        self.perform(self.core.receive(message, len(payload), now), payload, now)

    def expect(self, key: Key, binding: Binding, now: float) -> None:
        if self.closing:
            self._guarded(self._on_event, Aborted(key, "the decode worker is closing"))
            return
        self.perform(self.core.expect(key, binding, now))

    # --- SocketThread

    def on_close(self, now: float) -> None:
        self.perform(self.core.abort_all("the decode worker is closing", now))
        if self._inlets:
            self._inlets.close(now)

    def may_stop(self) -> bool:
        return self.core.idle

    def next_deadline(self, now: float) -> float:
        return min(self.core.deadline, now + _RETRY_S) if self._outboxes else self.core.deadline

    def close_sockets(self) -> None:
        if self._gate:
            self._gate.close()
        if self._groups:
            self._groups.port.close()
        if self._inlets:
            self._inlets.close(time.monotonic())
        super().close_sockets()

    def on_readable(self, sock: zmq.Socket[bytes], now: float) -> None:
        if self._gate and self._gate.on_readable(sock):
            return
        heard = taken = 0
        while heard < MESSAGES_PER_TURN and taken < _BYTES_PER_TURN:
            try:
                name, *frames = receive(sock)
            except zmq.Again:
                return
            try:
                for message, payload in apart(frames):
                    self._authors.check(message, name.bytes, beside=sock is self._data)
                    self._hear(message, payload, now)
                    heard += 1
                    taken += len(payload)
            except m.MalformedMessage:
                self.counters.malformed += 1
                heard += 1

    def _hear(self, message: m.AnyMessage, payload: memoryview, now: float) -> None:
        if isinstance(message, m.Probe) and message.dst == self.core.incarnation:
            answer = m.ProbeAck(message.dst, message.src, message.nonce, m.checksum(payload))
            self.perform([Send(message.src, answer)])
            return
        if isinstance(message, m.Chunk) and not self._genuine(message, payload):
            self.counters.forged += 1  # as if it had never come: an answer could only serve its author
            return
        if isinstance(message, m.Join) and self._groups and message.dst == self.core.incarnation:
            self._groups.join(message)
        self.perform(self.core.receive(message, len(payload), now), payload, now)

    def _genuine(self, chunk: m.Chunk, payload: memoryview) -> bool:
        return not self._security.macs or mac.genuine(chunk, payload, self.core.mac_key(chunk.key))

    def on_turn(self, now: float) -> None:
        self.perform(self.core.tick(now))
        if self._inlets:
            self._inlets.tick(now)
        self.perform(self.core.acks())
        if self._gate:
            self._gate.tick()
        for peer in list(self._outboxes):
            self._flush(peer)

    # --- actions

    def perform(self, actions: list[Action], payload: memoryview = EMPTY, now: float = 0.0) -> None:
        for action in actions:
            match action:
                case Send():
                    self._send(action)
                case Write():
                    self.write(action, payload, now)
                case Emit():
                    self._guarded(self._on_event, action.event)
                case Entered():
                    self.faults.point(action.point)
                case _:
                    raise TypeError(f"not an action of a receiver: {action}")

    def write(self, write: Write, payload: memoryview, now: float) -> None:
        if not self._undamaged(write, payload):
            self.counters.chunks_corrupt += 1
            self.perform(self.core.wrote(write.key, write.seq, False, now))
            return
        self.faults.point("chunk_writing")
        try:
            self._scatter(write, payload)
        except Exception as error:  # of the pool, whatever it is: this transfer ends, the others go on
            self.perform(self.core.write_failed(write.key, write.seq, f"writing pages: {error}", now))
            return
        self.counters.bytes_received += len(payload)
        self.perform(self.core.wrote(write.key, write.seq, True, now))

    def _undamaged(self, write: Write, payload: memoryview) -> bool:
        whole = len(payload) == write.slice.wire_bytes(self._layout) and not (write.words and len(payload) % 4)
        return whole and m.chunk_checksum(write.words, payload) == write.crc

    def _scatter(self, write: Write, payload: memoryview) -> None:
        tokens, layers, heads = write.slice.ranges
        if self._encoding:
            payload = self._encoding.decode(payload, len(tokens), len(layers)).data
        self._store.write(write.pages, tokens, layers, heads, payload)

    def _send(self, send: Send) -> None:
        message = send.message
        if isinstance(message, m.HelloAck):
            message = self._with_ports(message)
        self.deliver(m.kind(message), [m.encode(message)], lambda out: self._queue(send.to, out))

    def _with_ports(self, ack: m.HelloAck) -> m.HelloAck:
        """Says where data may go, beside the control address."""
        if self._gate and self._data_port:
            ack = replace_fields(ack, data_port=self._data_port, data_token=self._gate.token(ack.dst))
        if self._groups:
            ack = replace_fields(ack, group_port=self._groups.store_port)
        if self._inlets and not ack.refusal:
            ack = replace_fields(
                ack,
                direct_port=self._inlets.port,
                direct_token=self._inlets.token(ack.dst),
                place=self._inlets.place,
            )
        return ack

    def _queue(self, peer: str, frames: Frames) -> None:
        outbox = self._outboxes.setdefault(peer, deque())
        if len(outbox) >= self.limits.queue_messages:
            self.counters.dropped += 1
            return
        outbox.append(frames)
        if self.faults.active:  # a message that is said to have left has
            self._flush(peer)

    def _flush(self, peer: str) -> None:
        outbox = self._outboxes[peer]
        try:
            # The name of the connection is not part of a message: faults must not touch it.
            send_queued(self._router, outbox, self.most_together, f"{peer}/c".encode())
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.counters.dropped += len(outbox)  # nobody of this name is connected; the timers see to the rest
            outbox.clear()
        if not outbox:
            del self._outboxes[peer]


def _next_port(listen: str) -> str:
    """The endpoint beside this one; any free one where this one is any free one."""
    host, _, port = listen.rpartition(":")
    return f"{host}:{int(port) + 1 if port.isdigit() and int(port) else 0}"
