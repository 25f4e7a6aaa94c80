"""What the engine thread of either worker does around the model: an inbox, the open attempts, their deadlines.

Owns: the queue into the engine thread and the rules on attempts that do not depend on the role: one attempt per
request, higher epochs replace lower ones, a lost session ends what it carried, an expired deadline ends a request.
Must not: know the engine, pages or the KV channel (the roles' own loops do), or run on the asyncio thread.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from lanewise.errors import ErrorCode, LanewiseError
from lanewise.fleet import Lane
from lanewise.request import Failure, Submission
from lanewise.rpc.outbox import Outbox

Key = tuple[str, int]
REPORT_INTERVAL_S = 0.02
REPORT_QUIET_S = 0.002  # before it waits, the thread lets the tokens leave: both need the interpreter
AUDIT_QUIET_S = 0.1  # an audit looks at every page: not while the next request may be on its way
EXIT_CRASH = 70  # EX_SOFTWARE: the supervisor restarts, the router fails over

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One (request, epoch) on this worker."""

    session: str
    submission: Submission
    arrived_at: float
    deadline_at: float

    @property
    def key(self) -> Key:
        return self.submission.key


A = TypeVar("A", bound=Attempt)


class WorkerLoop(ABC, Generic[A]):
    """Base of the two roles' loops; implements `rpc.serve.Backend`."""

    def __init__(self, outbox: Outbox, clock: Callable[[], float] = time.monotonic) -> None:
        self.outbox = outbox
        self.clock = clock
        self.attempts: dict[Key, A] = {}
        self.draining = False
        self.lane = Lane.ANY
        self.lane_generation = 0
        self.lane_moved_at = clock()
        self.leaked_blocks = 0
        self._reported_at = 0.0
        self._worked_at = clock()
        self._audit_due = False
        self._newest: dict[str, int] = {}  # request id -> epoch of its open attempt
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------ roles fill these in

    @abstractmethod
    def open(self, session: str, submission: Submission, now: float) -> A:
        """Take in a submission that came at `now`; raises LanewiseError to refuse it."""

    @abstractmethod
    def close(self, attempt: A, reason: str) -> None:
        """Stop all work on an attempt that has ended for the router, and free what it holds as soon as that is safe."""

    @abstractmethod
    def turn(self, now: float) -> float | None:
        """One round of work. Returns how long the thread may sleep: 0 for not at all, None for until called."""

    @abstractmethod
    def on_peers(self, peers: Iterable[tuple[str, str, str]]) -> None:
        """Decode workers (kv_address, incarnation, fingerprint) that may become partners."""

    @abstractmethod
    def audit(self) -> list[str]:
        """Every inconsistency of the KV pool, given that nothing holds a page."""

    @abstractmethod
    def publish(self, now: float) -> None:
        """Put statistics and cache events into the outbox."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Nothing open and nothing lent; read from the asyncio thread while draining."""

    # ------------------------------------------------------------ Backend (any thread)

    def submit(self, session: str, submission: Submission) -> None:
        now = self.clock()  # it has been waiting since, whenever the step that runs is over
        self.call(lambda: self._submit(session, submission, now))

    def cancel(self, key: Key, reason: str) -> None:
        self.call(lambda: self._cancel(key, reason))

    def session_lost(self, session: str) -> None:
        self.call(lambda: self._session_lost(session))

    def set_lane(self, lane: Lane, expected_generation: int) -> None:
        self.call(lambda: self._set_lane(lane, expected_generation))

    def set_peers(self, peers: tuple[tuple[str, str, str], ...]) -> None:
        self.call(lambda: self.on_peers(peers))

    def drain(self) -> None:
        self.call(self._drain)

    def give_back(self) -> None:
        """The drain is over: routers place elsewhere, at no cost, whatever is still open."""
        self.call(self._give_back)

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the engine thread."""
        self._inbox.put(function)

    # ------------------------------------------------------------ life of the thread

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end after its current round; True when it did within the time."""
        self._stopping.set()
        self.call(lambda: None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            sleep_s: float | None = 0.0
            while not self._stopping.is_set():
                heard = self._receive(sleep_s)
                now = self.clock()
                if heard:
                    self._worked_at = now
                self._expire(now)
                sleep_s = self.turn(now)
                if sleep_s == 0:
                    self._worked_at = now
                self.outbox.flush()
                if sleep_s == 0:
                    self.report()
                elif not heard:
                    self._report_when_quiet()
        except BaseException:
            # State after an unforeseen error is not to be trusted: end at once, so that routers resume elsewhere.
            log.critical("engine_thread_died", exc_info=True)
            os._exit(EXIT_CRASH)

    def _receive(self, sleep_s: float | None) -> bool:
        """Run everything in the inbox; when there is nothing, wait for it as long as the round allows.

        False: nothing came.
        """
        try:
            first = self._inbox.get(timeout=self._patience(sleep_s)) if sleep_s != 0 else self._inbox.get_nowait()
        except queue.Empty:
            return False
        first()
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return True

    def _patience(self, sleep_s: float | None) -> float:
        """Never past the nearest deadline, and never more than a second, so that nothing waits for a lost wake-up."""
        now = self.clock()
        nearest = min((a.deadline_at for a in self.attempts.values()), default=now + 1.0)
        longest = 1.0
        if self._reported_at < self._worked_at:
            longest = REPORT_QUIET_S
        elif self._audit_due and self.idle:
            longest = AUDIT_QUIET_S
        return max(0.0, min(longest if sleep_s is None else sleep_s, nearest - now, longest))

    # ------------------------------------------------------------ rules

    def report(self, *, force: bool = False) -> None:
        """Publish statistics and cache events, at most every REPORT_INTERVAL_S unless the thread is about to wait."""
        now = self.clock()
        if force or now - self._reported_at >= REPORT_INTERVAL_S:
            self._reported_at = now
            self.publish(now)
        self.outbox.flush()

    def pages_changed_hands(self) -> None:
        """Something was released: audit the pool when the worker has next been idle for AUDIT_QUIET_S."""
        self._audit_due = True

    def _report_when_quiet(self) -> None:
        if self._reported_at < self._worked_at:
            self.report(force=True)
        elif self._audit_due and self.idle:
            self._audit()

    def _audit(self) -> None:
        self._audit_due = False
        defects = self.audit()
        self.leaked_blocks = len(defects)
        self.report(force=True)
        if defects:
            log.error("kv_pool_audit_failed", defects=defects[:20])

    def _submit(self, session: str, submission: Submission, now: float) -> None:
        request_id, epoch = submission.key
        newest = self._newest.get(request_id)
        if newest is not None:
            if newest >= epoch:
                log.warning("stale_submit", request_id=request_id, epoch=epoch, newest=newest)
                return
            self.end((request_id, newest), "replaced by a newer attempt")
        try:
            if self.draining:
                raise LanewiseError(ErrorCode.DRAINING, "this worker is draining")
            attempt = self.open(session, submission, now)
        except LanewiseError as error:
            retryable = error.code in (ErrorCode.DRAINING, ErrorCode.NO_WORKERS)
            self.outbox.failed(session, Failure(request_id, epoch, error.code, error.message, retryable))
            return
        self.attempts[attempt.key] = attempt
        self._newest[request_id] = epoch

    def _cancel(self, key: Key, reason: str) -> None:
        if key in self.attempts:
            self.end(key, reason or "cancelled by the router")

    def _session_lost(self, session: str) -> None:
        for key in [k for k, a in self.attempts.items() if a.session == session]:
            self.end(key, "session lost")

    def _set_lane(self, lane: Lane, expected_generation: int) -> None:
        # Compare-and-set, so that several routers cannot fight over one worker.
        if expected_generation != self.lane_generation or lane == self.lane:
            return
        self.lane, self.lane_moved_at = lane, self.clock()
        self.lane_generation += 1

    def _drain(self) -> None:
        self.draining = True

    def _give_back(self) -> None:
        for key in list(self.attempts):
            self.fail(key, ErrorCode.DRAINING, "this worker stops", retryable=True)

    def _expire(self, now: float) -> None:
        for key in [k for k, a in self.attempts.items() if a.deadline_at <= now]:
            self.fail(key, ErrorCode.DEADLINE, "the deadline passed on the worker")

    def fail(self, key: Key, code: ErrorCode, message: str, *, retryable: bool = False) -> None:
        """End an attempt with an error that the router is told."""
        attempt = self.attempts[key]
        self.outbox.failed(attempt.session, Failure(key[0], key[1], code, message, retryable))
        self.end(key, message)

    def end(self, key: Key, reason: str) -> None:
        """Forget the attempt; the role frees what it holds."""
        attempt = self.attempts.pop(key)
        if self._newest.get(key[0]) == key[1]:
            del self._newest[key[0]]
        self.close(attempt, reason)
