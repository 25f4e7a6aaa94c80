"""`lanewise.v1.Fleet`: what one router sees, for the operator.

Owns: the account of this router's view. Must not: decide anything; whoever asks several routers adds them up.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import grpc

from lanewise.fleet import Lane, Role
from lanewise.policy.scaling_meter import DemandMeter
from lanewise.router.catalog import Catalog
from lanewise.router.discovery import Discovery
from lanewise.router.dispatch import Dispatcher
from lanewise.router.generation import Front
from lanewise.router.ledger import Ledger, Way
from lanewise.router.roster import Roster
from lanewise.router.session import Session
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Self:
    """This router."""

    incarnation: str
    name: str


class FleetService(pb_grpc.FleetServicer):
    def __init__(
        self,
        me: Self,
        roster: Roster,
        dispatcher: Dispatcher,
        catalog: Catalog,
        discovery: Discovery,
        demand: DemandMeter,
        front: Front,
    ) -> None:
        self._me = me
        self._demand = demand
        self._roster = roster
        self._dispatcher = dispatcher
        self._catalog = catalog
        self._discovery = discovery
        self._front = front
        self.draining = False

    async def Snapshot(self, request: pb.FleetRequest, context: Context | None) -> pb.FleetReply:
        if request.HasField("max_hold_s"):
            self._dispatcher.hold_for(request.max_hold_s)
        now = time.monotonic()
        ledger = self._dispatcher.ledger
        sessions = self._roster.sessions()
        return pb.FleetReply(
            router=self._me.incarnation,
            router_name=self._me.name,
            draining=self.draining,
            arrivals=self._dispatcher.arrivals,
            held=self._front.num_held,
            running=self._dispatcher.num_running,
            resumed=ledger.resumed,
            held_total=ledger.held + self._front.early_total,
            failed=ledger.failed,
            kv_transfers=ledger.kv_transfers,
            handovers=ledger.handovers,
            workers=[_worker(session, now) for session in sessions],
            models=self._models(sessions),
            discovery=self._view(now),
            disaggregation=pb.Disaggregation(remote=_way(ledger.remote), local=_way(ledger.local)),
            lanes=_lanes(ledger, sessions),
            demand=pb.Demand(**self._demand.sums),
        )

    def _models(self, sessions: list[Session]) -> list[pb.FleetModel]:
        workers = Counter((s.description.model, s.description.role) for s in sessions)
        return [
            pb.FleetModel(
                name=model.name,
                max_context_tokens=model.max_context_tokens,
                prefill_workers=workers[model.name, Role.PREFILL.value],
                decode_workers=workers[model.name, Role.DECODE.value],
            )
            for model in self._catalog.models()
        ]

    def _view(self, now: float) -> pb.DiscoveryView:
        fresh = self._discovery.freshness
        return pb.DiscoveryView(
            kind=fresh.kind,
            synced=fresh.synced,
            stale_s=fresh.stale_s(now),
            endpoints=len(self._roster.endpoints),
            error=fresh.error,
        )


def _worker(session: Session, now: float) -> pb.FleetWorker:
    return pb.FleetWorker(
        description=session.description,
        stats=session.wire_stats,
        ready=not session.not_ready,
        stats_age_s=now - session.stats_at if session.stats_at else 0.0,
        inflight=len(session.carried),
        address=session.address,
        terminating=session.endpoint.terminating,
        reason=session.not_ready,
    )


def _way(way: Way) -> pb.PrefillWay:
    ttft_s, predicted_s, other_s = way.means
    return pb.PrefillWay(
        weight=way.weight,
        requests=way.requests,
        ttft_s=ttft_s,
        predicted_ttft_s=predicted_s,
        other_ttft_s=other_s,
    )


def _lanes(ledger: Ledger, sessions: list[Session]) -> list[pb.FleetLane]:
    """A prefill worker of lane `any` serves both."""
    prefill = [s.stats.lane for s in sessions if s.description.role == Role.PREFILL]
    return [
        pb.FleetLane(
            name=lane.value,
            max_tokens=ledger.boundary_tokens if lane is Lane.SHORT else 0,
            workers=sum(mine in (lane, Lane.ANY) for mine in prefill),
            requests=times.requests,
            ttft_p99_s=times.p99_s,
        )
        for lane, times in ledger.lanes.items()
    ]
