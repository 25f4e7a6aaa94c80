"""Carries every accepted request from its arrival to its one end: the shell around flight.py.

Owns: all flights, holding, admission, timers, and what is kept for Explain.
Must not: decide what a transition means (flight.py does), choose workers (placement.py does), or await anything:
every method here runs to its end on the event loop, so no two can interleave.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from lanewise.config import RouterConfig
from lanewise.errors import ErrorCode, LanewiseError
from lanewise.request import Failure, Mode, Token
from lanewise.router.entry import Entry, Sink
from lanewise.router.flight import Flight
from lanewise.router.held import Held
from lanewise.router.ledger import Ledger
from lanewise.router.metrics import RouterMetrics
from lanewise.router.orders import Action, Cancel, Emit, End, Limits, Order, Phase, Release, Submit
from lanewise.router.placement import Placement, Placer
from lanewise.router.refusals import Refusals
from lanewise.router.roster import Roster
from lanewise.router.session import Key, Session
from lanewise.router.trails import Trail, Trails
from lanewise.rpc import convert
from lanewise.rpc import lanewise_pb2 as pb

ACCOUNT_DELAY_S = 0.002  # metrics of a request wait until its answer is written
HANDOVER_INTERVAL_S = 0.2  # a worker that hands over says so with every message: looked at this often

log = structlog.get_logger(__name__)


class Dispatcher:
    def __init__(
        self, config: RouterConfig, roster: Roster, metrics: RouterMetrics, on_routable: Callable[[], None]
    ) -> None:
        self._config = config
        self._limits = Limits(config.hold_timeout_s, config.retry_budget, config.commit_to_token_s)
        self._roster = roster
        self._metrics = metrics
        self._on_routable = on_routable
        self._loop = asyncio.get_running_loop()
        self._entries: dict[str, Entry] = {}
        self._held = Held[Entry](config.hold_max_requests, config.hold_max_bytes)
        self._refusals = Refusals(config, self._held, metrics.demand)
        self._trails = Trails()
        self.placer = Placer(config, roster)
        self.ledger = Ledger(config.ttft_target_s, config.short_max_tokens or None)
        self.arrivals = 0
        self.idle = asyncio.Event()  # nothing runs
        self.idle.set()
        self.routable = False  # a pair has been there at least once, or there are no workers by intention
        metrics.running.set_function(lambda: len(self._entries))

    # ------------------------------------------------------------ from the front

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_running(self) -> int:
        return len(self._entries)

    @property
    def hold_timeout_s(self) -> float:
        """How long a request may wait for a worker pair."""
        return self._limits.hold_timeout_s

    def hold_for(self, seconds: float) -> None:
        """So long from now on, within what is configured: whoever reaches this port can ask. Requests that wait already
        keep their time."""
        self._limits = self._limits.holding(seconds, self._config.hold_timeout_s)

    def start(self, order: Order, sink: Sink, choice: int) -> None:
        """Accept a request. Everything that becomes of it, its end included, goes to the sink."""
        now = time.monotonic()
        flight = Flight(order, self._limits, waiting_since=now)
        entry = Entry(flight, sink, choice, now, came_back=self._refusals.came_back(order, choice, now))
        self._entries[order.request_id] = entry
        self.idle.clear()
        self.arrivals += 1
        self._metrics.arrivals.inc()
        self._metrics.prompt_tokens.inc(len(order.prompt_ids))
        placement = self.placer.choose(flight, now)
        others = (other for other in self._entries.values() if other.sink is not sink)
        error = self._refusals.judge(entry, placement, lambda: next(others, None) is None, now)
        if error is not None or placement is None:
            self._settle(entry, flight.fail(error, now) if error else [], now)
        else:
            self._launch(entry, placement, now)

    def cancel(self, request_id: str, reason: str = "cancelled by the client") -> None:
        if entry := self._entries.get(request_id):
            now = time.monotonic()
            self._settle(entry, entry.flight.cancel(now, reason), now)

    def stop(self, request_id: str, stop_string: str) -> None:
        """The text of this request has reached a stop string."""
        if entry := self._entries.get(request_id):
            now = time.monotonic()
            self._settle(entry, entry.flight.stop(stop_string, now), now)

    def end_all(self, error: LanewiseError) -> None:
        """The process stops: nobody is left without an answer."""
        now = time.monotonic()
        for entry in list(self._entries.values()):
            self._settle(entry, entry.flight.fail(error, now), now)

    def explain(self, request_id: str) -> Trail | None:
        if entry := self._entries.get(request_id):
            return Trail(entry.started_at, tuple(entry.flight.steps))
        return self._trails.get(request_id)

    # ------------------------------------------------------------ from the sessions

    def tokens(self, source: str, tokens: list[Token]) -> None:
        now = time.monotonic()
        for token in tokens:
            entry = self._entries.get(token.request_id)
            if entry is not None:
                self._settle(entry, entry.flight.token(token, source, now), now)

    def accepted(self, source: str, key: Key, cached_tokens: int) -> None:
        if entry := self._entries.get(key[0]):
            entry.flight.accepted(key[1], source, cached_tokens)

    def committed(self, key: Key) -> None:
        if entry := self._entries.get(key[0]):
            now = time.monotonic()
            attempt = entry.flight.attempt
            if attempt is not None and attempt.epoch == key[1] and attempt.committed_at is None:
                self.ledger.kv_transfers += 1
            self._settle(entry, entry.flight.committed(key[1], now), now)

    def transfer_failed(self, source: str, key: Key, reason: str) -> None:
        if entry := self._entries.get(key[0]):
            now = time.monotonic()
            log.warning("transfer_failed", request_id=key[0], epoch=key[1], reason=reason)
            self._settle(entry, entry.flight.transfer_failed(key[1], source, reason, now), now)

    def failed(self, source: str, failure: Failure) -> None:
        if entry := self._entries.get(failure.request_id):
            now = time.monotonic()
            self._settle(entry, entry.flight.failed(failure, source, now), now)

    def session_lost(self, incarnation: str, keys: Sequence[Key], reason: str) -> None:
        now = time.monotonic()
        for request_id, epoch in keys:
            if entry := self._entries.get(request_id):
                self._settle(entry, entry.flight.worker_lost(incarnation, epoch, now, f"worker lost: {reason}"), now)

    def fleet_changed(self) -> None:
        now = time.monotonic()
        if not self.routable and (self._roster.vacant or self.placer.any_pair(now)):
            self.routable = True
            self._on_routable()
        hopeless: set[tuple[str, str, bool]] = set()
        for entry in self._held:
            flight = entry.flight
            kind = (flight.order.model, flight.fingerprint, bool(flight.exclude))
            if kind not in hopeless and not flight.not_before and not self._place(entry, now):
                hopeless.add(kind)

    def hand_over(self, session: Session) -> None:
        """A draining worker waits for others to take its streams: move those for which there is a pair now."""
        now = time.monotonic()
        assert session.identity is not None  # only welcomed sessions have statistics
        if now - session.handed_over_at < HANDOVER_INTERVAL_S:
            return
        session.handed_over_at = now
        for request_id, _ in list(session.carried):
            entry = self._entries.get(request_id)
            if entry is not None and self.placer.choose(entry.flight, now) is not None:
                self.ledger.handovers += 1
                reason = f"{session.identity.name} drains"
                self._settle(entry, entry.flight.hand_over(session.identity.incarnation, reason, now), now)

    # ------------------------------------------------------------ placement

    def _place(self, entry: Entry, now: float) -> bool:
        placement = self.placer.choose(entry.flight, now)
        if placement is not None:
            self._launch(entry, placement, now)
        return placement is not None

    def _launch(self, entry: Entry, placement: Placement, now: float) -> None:
        self._held.remove(entry.flight.order)
        entry.placement = placement
        if entry.flight.output_ids:
            self.ledger.resumed += 1
        self._settle(entry, entry.flight.place(placement.pair, placement.decode, now), now)

    # ------------------------------------------------------------ acting

    def _settle(self, entry: Entry, actions: list[Action], now: float) -> None:
        """Do what a transition asked for, then hold, place or time the flight as its phase needs."""
        for action in actions:
            if isinstance(action, Emit):
                self._emit(entry, action.token, now)
            elif isinstance(action, Submit):
                self._submit(entry, action)
            elif isinstance(action, Cancel | Release):
                self._leave(entry, action)
            else:
                self._finish(entry, action, now)
                return
        if entry.flight.phase is not Phase.WAITING or not self._wait(entry, now):
            self._arm(entry)

    def _wait(self, entry: Entry, now: float) -> bool:
        """Hold a flight that needs a pair; true when one was found at once."""
        flight = entry.flight
        if flight.order.request_id not in self._held:
            self._held.add(flight.order, entry)
            if flight.epoch:
                what, reason = flight.last_step
                self._metrics.failovers.labels(what).inc()
                log.info(what, request_id=flight.order.request_id, epoch=flight.epoch, reason=reason)
                if not flight.not_before and self._place(entry, now):
                    return True
        if not entry.was_held and not flight.not_before:
            entry.was_held = True
            self.ledger.held += 1
        return False

    def _emit(self, entry: Entry, token: Token, now: float) -> None:
        if not entry.first_at:
            entry.first_token(now, self._metrics, self.ledger)
        entry.last_at = now
        self._metrics.token()
        entry.sink.put(entry.choice, token)

    def _submit(self, entry: Entry, action: Submit) -> None:
        submission = action.submission
        session = self._roster.session(action.incarnation)
        if session is None:  # pragma: no cover - snapshots are taken from live sessions in the same step
            raise RuntimeError(f"no session with {action.incarnation}")
        uncached = 0
        if submission.mode is not Mode.DECODE:
            assert entry.placement is not None  # what a submission comes of
            hit = entry.placement.hits.get(action.incarnation, 0)
            self._metrics.placed(submission, hit, entry.came_back)
            uncached = len(submission.prompt_ids) + len(submission.resumed_output_ids) - hit
        session.carry(submission.key, uncached)
        session.send(pb.RouterMessage(submit=convert.submit_to_wire(submission)))

    def _leave(self, entry: Entry, action: Cancel | Release) -> None:
        session = self._roster.session(action.incarnation)
        if session is None:
            return
        request_id = entry.flight.order.request_id
        session.release((request_id, action.epoch))
        if isinstance(action, Cancel):
            cancel = pb.Cancel(request_id=request_id, epoch=action.epoch, reason=action.reason)
            session.send(pb.RouterMessage(cancel=cancel))

    def _finish(self, entry: Entry, end: End, now: float) -> None:
        flight, request_id = entry.flight, entry.flight.order.request_id
        self._held.remove(flight.order)
        del self._entries[request_id]
        if not self._entries:
            self.idle.set()
        if entry.timer is not None:
            entry.timer.cancel()
        entry.sink.put(entry.choice, end)
        self._trails.keep(request_id, Trail(entry.started_at, tuple(flight.steps)))
        self.ledger.failed += end.error is not None and end.error.code is not ErrorCode.CANCELLED
        ttft_s = entry.first_at - entry.started_at if entry.first_at else None
        outcome = end.error.code if end.error else end.reason
        account = (request_id, outcome, now - entry.started_at, ttft_s, entry.tpot_s)
        self._loop.call_later(ACCOUNT_DELAY_S, self._metrics.ended, *account)

    def _arm(self, entry: Entry) -> None:
        """One timer per flight. It may fire early and look again, so that a token never has to move it."""
        at = entry.flight.wake_at()
        if entry.timer is not None:
            if entry.timer_at <= at:
                return
            entry.timer.cancel()
        entry.timer_at = at
        # Time limits are on time.monotonic(), whatever clock the loop keeps.
        entry.timer = self._loop.call_later(max(at - time.monotonic(), 0.0), self._fire, entry)

    def _fire(self, entry: Entry) -> None:
        entry.timer = None
        now = time.monotonic()
        flight = entry.flight
        backing_off = bool(flight.not_before)
        actions = flight.timer(now)
        if not actions and backing_off and not flight.not_before and self._place(entry, now):
            return
        self._settle(entry, actions, now)
