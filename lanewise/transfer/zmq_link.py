"""The sockets of the KV channel and the one thread that owns them all.

Owns: socket options, the poller, the way in for other threads, bounded queues of control messages, fault hooks.
Must not: know states or pages; `sender.py` and `receiver.py` subclass `SocketThread` and supply those.
No exception of a handler ends the thread: it is logged and counted (`Counters.internal_errors`).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from lanewise.transfer.bundles import MOST
from lanewise.transfer.faults import Faults, Frames
from lanewise.transfer.messages import MAX_HEADER_BYTES
from lanewise.transfer.records import Counters, Limits

log = logging.getLogger("lanewise.transfer")

_POLLIN = int(zmq.POLLIN)
_MAX_POLL_S = 1.0


def common_options(sock: zmq.Socket[bytes], address: str) -> None:
    """What every socket of the channel has: nothing lingers, dead connections are noticed."""
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.IPV6, int("[" in address)),  # else an IPv4 endpoint is reported as a mapped IPv6 one
        (zmq.HEARTBEAT_IVL, 2000),
        (zmq.HEARTBEAT_TIMEOUT, 6000),
        (zmq.HEARTBEAT_TTL, 6000),
        (zmq.HANDSHAKE_IVL, 5000),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 30),
        (zmq.TCP_KEEPALIVE_INTVL, 5),
        (zmq.TCP_KEEPALIVE_CNT, 3),
    ):
        sock.setsockopt(option, value)


def make_router(context: zmq.Context[zmq.Socket[bytes]], address: str, limits: Limits) -> zmq.Socket[bytes]:
    sock = context.socket(zmq.ROUTER)
    common_options(sock, address)
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else messages to unknown peers vanish silently
    sock.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a reconnecting sender takes its name over from its old connection
    sock.setsockopt(zmq.SNDHWM, limits.control_hwm)
    sock.setsockopt(zmq.RCVHWM, limits.data_hwm)  # per connection; credit bounds the bytes, this the careless
    sock.setsockopt(zmq.MAXMSGSIZE, max(limits.max_chunk_bytes, MAX_HEADER_BYTES))
    return sock


class SocketThread(ABC):
    """One thread that waits on sockets, commands and timers."""

    def __init__(self, name: str, limits: Limits, counters: Counters, faults: Faults | None) -> None:
        self.limits = limits
        self.counters = counters
        self.faults = faults or Faults()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(zmq.IO_THREADS, limits.stripes)
        self.context.set(zmq.MAX_SOCKETS, 4096)
        self.poller = zmq.Poller()
        self.raw: dict[int, Callable[[float], None]] = {}  # what to do about descriptors that are no ZeroMQ sockets
        self._commands: deque[Callable[[float], None]] = deque()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._woken = False
        self._delayed: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._closing_until: float | None = None
        self._ended = False
        self._running = threading.RLock()  # contended only after the thread's end
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # --- for any thread

    def start_thread(self) -> None:
        self.poller.register(self._wake_out, zmq.POLLIN)
        self._thread.start()

    def command(self, step: Callable[[float], None]) -> None:
        """Runs a step on the transfer thread; once that has ended, here, so that what is begun still gets its end."""
        self._commands.append(step)
        if self._ended:
            self._run_commands()
        elif threading.get_ident() != self._thread.ident:  # else it looks anyway before it waits
            self._wake()

    def join(self, timeout: float) -> None:
        """Ends every transfer, tells the partners, and stops; waits `timeout` for them to answer."""
        if self._thread.ident is None or self._ended:
            self.release()
            return

        def begin_close(now: float) -> None:
            if self._closing_until is None:
                self._closing_until = now + timeout
                self.on_close(now)

        self.command(begin_close)
        self._thread.join(timeout + 5.0)

    @property
    def most_together(self) -> int:
        """Messages of one ZeroMQ message. With faults one: what is lost or damaged takes no other with it."""
        return 1 if self.faults.active else MOST

    @property
    def closing(self) -> bool:
        return self._closing_until is not None

    def _wake(self) -> None:
        if self._woken:
            return  # it has not looked yet, and will run this command too
        self._woken = True
        with contextlib.suppress(OSError):  # closed: nobody is left to wake
            self._wake_in.send(b"\0")

    # --- for the subclass

    @abstractmethod
    def on_close(self, now: float) -> None: ...

    @abstractmethod
    def on_readable(self, sock: zmq.Socket[bytes], now: float) -> None: ...

    @abstractmethod
    def on_turn(self, now: float) -> None:
        """Once per wake-up, after messages and commands: timers, chunks, ACKs, queued control messages."""

    @abstractmethod
    def next_deadline(self, now: float) -> float: ...

    @abstractmethod
    def may_stop(self) -> bool:
        """Whether a closing thread has nothing left to tell anybody."""

    def watch(self, sock: socket.socket, events: int, handler: Callable[[float], None]) -> None:
        """Calls the handler when one of the events may have happened; again with other events: those instead."""
        self.poller.register(sock, events)
        self.raw[sock.fileno()] = handler

    def unwatch(self, sock: socket.socket) -> None:
        self.poller.unregister(sock)
        self.raw.pop(sock.fileno())

    def close_sockets(self) -> None:
        self.context.destroy(linger=0)

    def deliver(self, kind: str, frames: Sequence[bytes | memoryview], send: Callable[[Frames], None]) -> None:
        """Sends a message through the fault hooks."""
        if not self.faults.active:
            send(list(frames))
            return
        for delivery in self.faults.deliveries(kind, frames):
            if delivery.delay_s <= 0:
                send(delivery.frames)
            else:
                due = time.monotonic() + delivery.delay_s
                late = delivery.frames
                heapq.heappush(self._delayed, (due, next(self._order), lambda late=late: send(late)))  # type: ignore[misc]
        self.faults.point(f"{kind.lower()}_sent")

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._finished(time.monotonic()):
                self._guarded(self._turn)
        finally:
            self._ended = True
            self._run_commands()  # they came too late, and each still gets its event
            self.release()

    def _finished(self, now: float) -> bool:
        return self._closing_until is not None and (now >= self._closing_until or self.may_stop())

    def _turn(self) -> None:
        now = time.monotonic()
        deadline = self.next_deadline(now)
        if self._delayed:
            deadline = min(deadline, self._delayed[0][0])
        if self._closing_until is not None:
            deadline = min(deadline, self._closing_until)
        wait_s = 0.0 if self._commands else min(max(deadline - now, 0.0), _MAX_POLL_S)
        ready = self.poller.poll(_milliseconds(wait_s))
        for sock, event in ready:
            if isinstance(sock, zmq.Socket):
                if int(event) & _POLLIN:
                    self._guarded(self.on_readable, sock, time.monotonic())
            elif sock in self.raw:
                self._guarded(self.raw[sock], time.monotonic())
            else:
                self._drain_wake()
        self._run_commands()
        while self._delayed and self._delayed[0][0] <= time.monotonic():
            with contextlib.suppress(zmq.ZMQError):  # its socket may be closed by now
                heapq.heappop(self._delayed)[2]()
        self._guarded(self.on_turn, time.monotonic())

    def _run_commands(self) -> None:
        with self._running:
            while self._commands:
                self._guarded(self._commands.popleft(), time.monotonic())

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)
        self._woken = False  # before the commands are run: what comes later wakes again

    def _guarded(self, step: Callable[..., None], *args: object) -> None:
        try:
            step(*args)
        except Exception:
            self.counters.internal_errors += 1
            log.exception("defect in the KV channel; the thread goes on")
            time.sleep(0.01)  # a defect that repeats must not take a core

    def release(self) -> None:
        """Closes what the thread owns; harmless when done before."""
        self.close_sockets()
        self._wake_in.close()
        self._wake_out.close()


def _milliseconds(seconds: float) -> int:
    """Rounded up: rounding down would spin until the deadline."""
    return int(seconds * 1000) + (seconds > 0)
