"""All workers this router is connected to, now.

Owns: one keeper task per address that holds a session open, and the immutable snapshots that routing decides on.
Must not: know requests beyond passing on which of them a lost session carried.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import structlog

from lanewise.fleet import FleetSnapshot, Role, WorkerIdentity
from lanewise.policy.baseline_routing import worker_cost
from lanewise.policy.blocks import UNIT_TOKENS, cache_key, chain_hashes
from lanewise.policy.cost import usual_cost
from lanewise.router.catalog import Catalog
from lanewise.router.discovery import Discovery, Endpoint, View
from lanewise.router.session import Key, Session, SessionEnded, Timing, Work
from lanewise.rpc import lanewise_pb2 as pb

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 0.5
UNREADY_BACKOFF_S = 2.0  # for an address that says it is not ready; it is tried at once when that changes
GONE = Endpoint(ready=False, terminating=True)  # an address that left: its streams may finish
STOPPING = "this router stops"
HEALTHY_S = 1.0  # a session that lived this long resets the back-off

log = structlog.get_logger(__name__)


class Listener(Work, Protocol):
    """The dispatcher."""

    def fleet_changed(self) -> None: ...
    def session_lost(self, incarnation: str, keys: Sequence[Key], reason: str) -> None: ...
    def hand_over(self, session: Session) -> None: ...


class Roster:
    def __init__(self, router: str, timing: Timing, catalog: Catalog, tls_dir: str = "") -> None:
        """`tls_dir`: certificates for the channels to workers; empty: channels without TLS."""
        self._router = router
        self._tls_dir = tls_dir
        self._timing = timing
        self._catalog = catalog
        self._listener: Listener | None = None
        self._sessions: dict[str, Session] = {}  # by incarnation; welcomed and alive
        self._view: View = {}
        self._discovery: Discovery | None = None
        self._nudges: dict[str, asyncio.Event] = {}  # by address: something changed, try again at once

    def listen(self, listener: Listener) -> None:
        self._listener = listener

    # ------------------------------------------------------------ for the dispatcher

    def session(self, incarnation: str) -> Session | None:
        return self._sessions.get(incarnation)

    def sessions(self) -> list[Session]:
        return list(self._sessions.values())

    def snapshot(self, model: str, fingerprint: str = "") -> FleetSnapshot:
        """Workers of that model, and of that fingerprint where one is given."""
        views = [
            session.view()
            for session in self._sessions.values()
            if (identity := _identity(session)).model == model and fingerprint in ("", identity.fingerprint)
        ]
        views.sort(key=lambda view: (view.identity.name, view.identity.incarnation))
        return FleetSnapshot(
            prefill=tuple(view for view in views if view.identity.role is Role.PREFILL),
            decode=tuple(view for view in views if view.identity.role is Role.DECODE),
        )

    def cached_tokens(self, ids: Sequence[int], salt: bytes) -> Mapping[str, int]:
        """Prefix hit of these ids by incarnation. Hashes are computed once per fingerprint."""
        if len(ids) <= UNIT_TOKENS:
            return {}
        hashes: dict[str, list[bytes]] = {}
        hits: dict[str, int] = {}
        for incarnation, session in self._sessions.items():
            if not len(session.prefixes):
                continue
            fingerprint = _identity(session).fingerprint
            if fingerprint not in hashes:
                hashes[fingerprint] = chain_hashes(ids, cache_key(fingerprint, salt))
            hits[incarnation] = session.prefixes.cached_tokens(hashes[fingerprint], len(ids))
        return hits

    # ------------------------------------------------------------ from the sessions

    def welcomed(self, session: Session) -> None:
        identity = _identity(session)
        if identity.incarnation in self._sessions:
            raise SessionEnded(f"{identity.name} is already connected at another address")
        self._sessions[identity.incarnation] = session
        session.place(self._view.get(session.address, GONE))
        log.info("worker_welcomed", worker=identity.name, incarnation=identity.incarnation, address=session.address)
        if identity.role is Role.DECODE:
            self._tell_peers(lambda other: True)
        else:
            self._tell_peers(lambda other: other is session)
        self._fleet_changed()

    def changed(self, session: Session) -> None:
        if not session.stats.cost_batches and _identity(session).role is Role.PREFILL:
            self._lend_cost(session)
        worker_cost(session.view())  # both are kept: made now, they do not cost the next request its time
        self._fleet_changed()
        if session.stats.handover and session.carried and self._listener is not None:
            self._listener.hand_over(session)

    def _lend_cost(self, session: Session) -> None:
        """A prefill worker that has measured nothing yet is placed by what the same device does in others: by the guess
        it starts with it could draw every request, or none. Decode workers are compared by one model anyway."""
        mine = _identity(session)
        alike = [
            (worker_cost(other.view()), other.stats.cost_batches)
            for other in self._sessions.values()
            if other is not session
            and (it := _identity(other)).role is mine.role
            and (it.device, it.fingerprint) == (mine.device, mine.fingerprint)
        ]
        if (cost := usual_cost(alike)) is not None:
            session.stats = replace(session.stats, cost=cost.to_mapping())

    # ------------------------------------------------------------ keepers

    async def run(self, discovery: Discovery) -> None:
        """Owned task: follows the addresses. An address that leaves keeps its session until that ends by itself."""
        self._discovery = discovery
        async with asyncio.TaskGroup() as group:
            keepers: dict[str, asyncio.Task[None]] = {}
            async for view in discovery.watch():
                self._view = view
                keepers = {address: task for address, task in keepers.items() if not task.done()}
                for address in view:
                    if address not in keepers:
                        self._nudges[address] = asyncio.Event()
                        keepers[address] = group.create_task(self._keep(address))
                self._look(view)

    @property
    def endpoints(self) -> View:
        """The last view of the addresses."""
        return self._view

    @property
    def vacant(self) -> bool:
        """The cluster has said that there is no worker at all: scaled to zero. A static list says no such thing."""
        discovery = self._discovery
        if discovery is None or self._view:
            return False
        return discovery.freshness.synced and discovery.freshness.kind != "static"

    def _look(self, view: View) -> None:
        """A new view: sessions learn what it says of them, and who waits to try again may try now."""
        for nudge in self._nudges.values():
            nudge.set()
        for session in self._sessions.values():
            session.place(view.get(session.address, GONE))
        self._fleet_changed()

    async def _keep(self, address: str) -> None:
        failures = 0
        quiet = False  # an absent worker is logged once, not at every attempt
        while address in self._view:
            assert self._listener is not None  # listen() comes before run()
            session = Session(address, self._router, self._timing, self._catalog, self, self._listener, self._tls_dir)
            started = time.monotonic()
            reason = STOPPING
            try:
                reason = await session.run()
            finally:
                self._gone(session, reason)
            if session.identity is None and not quiet:
                log.info("worker_unreachable", address=address, reason=reason)
            quiet = session.identity is None
            failures = 0 if session.identity and time.monotonic() - started > HEALTHY_S else failures + 1
            if failures > 0 and (session.identity is None or failures > 1):
                await self._back_off(address, failures)
        del self._nudges[address]

    async def _back_off(self, address: str, failures: int) -> None:
        endpoint = self._view.get(address, GONE)
        longest = LAST_BACKOFF_S if endpoint.ready else UNREADY_BACKOFF_S
        nudge = self._nudges[address]
        nudge.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16), longest)):
                await nudge.wait()

    def _gone(self, session: Session, reason: str) -> None:
        identity = session.identity
        if identity is None or self._sessions.get(identity.incarnation) is not session:
            return
        del self._sessions[identity.incarnation]
        keys = list(session.carried)
        expected = reason is STOPPING or (session.stats.draining and not keys)
        tell = log.info if expected else log.warning
        tell("session_lost", worker=identity.name, incarnation=identity.incarnation, reason=reason, requests=len(keys))
        if identity.role is Role.DECODE:
            self._tell_peers(lambda other: True)
        if self._listener is not None:
            self._listener.session_lost(identity.incarnation, keys, reason)
            self._fleet_changed()

    def _fleet_changed(self) -> None:
        if self._listener is not None:
            self._listener.fleet_changed()

    def _tell_peers(self, to: Callable[[Session], bool]) -> None:
        peers = pb.Peers()
        for session in self._sessions.values():
            identity = _identity(session)
            if identity.role is Role.DECODE:
                peers.peers.add(
                    kv_address=identity.kv_address,
                    incarnation=identity.incarnation,
                    fingerprint=identity.fingerprint,
                )
        for session in self._sessions.values():
            if _identity(session).role is Role.PREFILL and to(session):
                session.send(pb.RouterMessage(peers=peers))


def _identity(session: Session) -> WorkerIdentity:
    assert session.identity is not None  # only welcomed sessions are kept
    return session.identity
