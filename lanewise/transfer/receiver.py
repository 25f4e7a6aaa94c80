"""The decode side of the KV channel: takes chunks off the ROUTER, checks them, puts them into pages.

Owns: the ROUTER socket and the writing of pages; a chunk is copied once, from the network's buffer into the pool.
Must not: decide anything about a transfer; `receiver_core.py` does.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import zmq

from lanewise.errors import ConfigError
from lanewise.policy.blocks import UNIT_TOKENS
from lanewise.transfer import messages as m
from lanewise.transfer.faults import Faults, Frames, is_loopback
from lanewise.transfer.protocol import Action, Emit, Entered, Send, Write
from lanewise.transfer.receiver_core import ReceiverCore
from lanewise.transfer.records import (
    Aborted,
    Binding,
    Counters,
    Endpoint,
    Key,
    Limits,
    Pages,
    PageStore,
    ReceiverEvent,
    Timers,
    checked_key,
    packed_ids,
)
from lanewise.transfer.zmq_link import SocketThread, make_router, send_now

_BYTES_PER_TURN = 4 << 20  # then ACKs go out, and commands and timers have their turn
_MESSAGES_PER_TURN = 64
_RETRY_S = 0.01
_EMPTY = memoryview(b"")


class Receiver:
    def __init__(
        self,
        identity: Endpoint,
        store: PageStore,
        on_event: Callable[[ReceiverEvent], None],
        faults: Faults | None = None,
        *,
        listen: str = "tcp://127.0.0.1:0",
        timers: Timers | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._thread = _ReceiverThread(identity, store, on_event, faults, timers or Timers(), limits or Limits())
        self._listen = listen

    def start(self) -> str:
        """Binds, starts, and returns the endpoint with its real port."""
        endpoint = self._thread.bind(self._listen)
        self._thread.start_thread()
        return endpoint

    def close(self, timeout: float = 2.0) -> None:
        self._thread.join(timeout)

    def expect(self, key: Key, ids: Sequence[int], cache_key: bytes) -> None:
        """Submit arrived: KV under this name must be of exactly these ids."""
        thread, key, packed = self._thread, checked_key(key), packed_ids(ids)
        thread.command(lambda now: thread.expect(key, Binding.of(packed, cache_key), now))

    def grant(self, key: Key, pages: Pages, have_tokens: int) -> None:
        """Answers Offered: these pages take ids[have_tokens:]; the first `have_tokens` (a multiple of 64) are held."""
        if have_tokens < 0 or have_tokens % UNIT_TOKENS:
            raise ValueError(f"have_tokens must be a multiple of {UNIT_TOKENS}, not {have_tokens}")
        thread = self._thread
        thread.command(lambda now: thread.perform(thread.core.grant(key, pages, have_tokens, now)))

    def refuse(self, key: Key, busy: bool, reason: str, retry_after_s: float = 0.5) -> None:
        """Answers Offered with no. The transfer has ended; no event follows."""
        thread = self._thread
        thread.command(lambda now: thread.perform(thread.core.refuse(key, busy, reason, retry_after_s, now)))

    def cancel(self, key: Key, reason: str) -> None:
        """Ends a transfer in whatever state; Drained follows when no copy is under way, always."""
        thread = self._thread
        thread.command(lambda now: thread.perform(thread.core.cancel(key, reason, now)))

    def snapshot(self) -> Counters:
        return replace(self._thread.counters)


class _ReceiverThread(SocketThread):
    def __init__(
        self,
        identity: Endpoint,
        store: PageStore,
        on_event: Callable[[ReceiverEvent], None],
        faults: Faults | None,
        timers: Timers,
        limits: Limits,
    ) -> None:
        super().__init__("kv-receiver", limits, Counters(), faults)
        self.core = ReceiverCore(identity, timers, limits, self.counters, bound=not self.faults.unbound)
        self._layout = identity.layout
        self._store = store
        self._on_event = on_event
        self._stuck: dict[str, deque[Frames]] = {}  # control messages a sender's connection had no room for

    def bind(self, listen: str) -> str:
        if self.faults.active and not is_loopback(listen):
            self.release()
            raise ConfigError(f"faults are on, and {listen} is not loopback")
        self._router = make_router(self.context, listen, self.limits)
        try:
            self._router.bind(listen)
        except zmq.ZMQError as error:
            self.release()
            raise ConfigError(f"cannot listen on {listen!r}: {error}") from None
        self.poller.register(self._router, zmq.POLLIN)
        return bytes(self._router.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")

    def expect(self, key: Key, binding: Binding, now: float) -> None:
        if self.closing:
            self._guarded(self._on_event, Aborted(key, "the decode worker is closing"))
            return
        self.perform(self.core.expect(key, binding, now))

    # --- SocketThread

    def on_close(self, now: float) -> None:
        self.perform(self.core.abort_all("the decode worker is closing", now))

    def may_stop(self) -> bool:
        return self.core.idle

    def next_deadline(self, now: float) -> float:
        return min(self.core.deadline, now + _RETRY_S) if self._stuck else self.core.deadline

    def on_readable(self, sock: zmq.Socket[bytes], now: float) -> None:
        taken = 0
        for _ in range(_MESSAGES_PER_TURN):
            try:
                routing_id = sock.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            header, payload = _rest(sock)
            taken += len(payload)
            try:
                message = _authored(m.decode(header), routing_id)
            except m.MalformedMessage:
                self.counters.malformed += 1
                continue
            if isinstance(message, m.Probe):
                answer = m.ProbeAck(message.dst, message.src, message.nonce, m.checksum(payload))
                if message.dst == self.core.incarnation:
                    self.perform([Send(message.src, answer)])
                    continue
            self.perform(self.core.receive(message, len(payload), now), payload, now)
            if taken >= _BYTES_PER_TURN:
                return

    def on_turn(self, now: float) -> None:
        self.perform(self.core.tick(now))
        self.perform(self.core.acks())
        for peer in list(self._stuck):
            self._flush(peer)

    # --- actions

    def perform(self, actions: list[Action], payload: memoryview = _EMPTY, now: float = 0.0) -> None:
        for action in actions:
            match action:
                case Send():
                    self._send(action)
                case Write():
                    self._write(action, payload, now)
                case Emit():
                    self._guarded(self._on_event, action.event)
                case Entered():
                    self.faults.point(action.point)
                case _:
                    raise TypeError(f"not an action of a receiver: {action}")

    def _write(self, write: Write, payload: memoryview, now: float) -> None:
        good = len(payload) == write.slice.nbytes(self._layout) and m.checksum(payload) == write.crc
        if not good:
            self.counters.chunks_corrupt += 1
            self.perform(self.core.wrote(write.key, write.seq, False, now))
            return
        self.faults.point("chunk_writing")
        try:
            self._store.write(write.pages, write.slice.tokens, write.slice.layers, payload)
        except Exception as error:  # of the pool, whatever it is: this transfer ends, the others go on
            self.perform(self.core.write_failed(write.key, write.seq, f"writing pages: {error}", now))
            return
        self.counters.bytes_received += len(payload)
        self.perform(self.core.wrote(write.key, write.seq, True, now))

    def _send(self, send: Send) -> None:
        routing_id = f"{send.to}/c"
        frames = [routing_id.encode(), m.encode(send.message)]
        # The name of the connection is not part of the message: faults must not touch it.
        self.deliver(m.kind(send.message), frames[1:], lambda out: self._queue(send.to, [frames[0], *out]))

    def _queue(self, peer: str, frames: Frames) -> None:
        queue = self._stuck.setdefault(peer, deque())
        if len(queue) >= self.limits.queue_messages:
            self.counters.dropped += 1
            return
        queue.append(frames)
        self._flush(peer)

    def _flush(self, peer: str) -> None:
        queue = self._stuck[peer]
        try:
            while queue and send_now(self._router, queue[0]):
                queue.popleft()
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.counters.dropped += len(queue)  # nobody of this name is connected; the timers see to the rest
            queue.clear()
        if not queue:
            del self._stuck[peer]


def _rest(sock: zmq.Socket[bytes]) -> tuple[memoryview, memoryview]:
    """Header and payload of a message whose first frame was read; frames beyond those are thrown away."""
    found: list[memoryview] = []
    while sock.getsockopt(zmq.RCVMORE):
        if len(found) < 2:
            found.append(sock.recv(copy=False).buffer)
        else:
            sock.recv_into(bytearray())
    found += [_EMPTY] * (2 - len(found))
    return found[0], found[1]


def _authored(message: m.AnyMessage, routing_id: bytes) -> m.AnyMessage:
    """Refuses a message that names another author than the connection it came by, or came by the wrong kind of it."""
    author, _, channel = routing_id.rpartition(b"/")
    data = isinstance(message, m.Chunk | m.Probe)
    if author != message.src.encode() or not channel.startswith(b"d" if data else b"c"):
        raise m.MalformedMessage("author and connection differ")
    return message
