"""The state of a service's fleet, asked from every one of its routers.

Owns: `Fleet/Snapshot` calls and how answers of several routers become one view: arrivals and held requests are summed,
a worker's state is the newest that any router has, by incarnation. Must not: decide what a view means (status.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc

CALL_TIMEOUT_S = 1.5
MAX_MESSAGE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LinkView:
    """A KV path, as the prefill worker at its start measured it."""

    peer: str  # incarnation of the decode worker
    state: str  # untested, verified or failed
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One worker process."""

    role: str
    name: str
    incarnation: str
    fingerprint: str
    ready: bool
    draining: bool
    age_s: float  # of this news
    drain_eta_s: float = 0.0
    links: tuple[LinkView, ...] = ()


@dataclass(frozen=True, slots=True)
class Way:
    """Recent requests that went one way: decaying means; `weight` is how many they stand for."""

    weight: float = 0.0
    ttft_s: float = 0.0
    predicted_ttft_s: float = 0.0
    other_ttft_s: float = 0.0  # what the same requests would have taken the other way, as predicted


@dataclass(frozen=True, slots=True)
class LaneFacts:
    name: str
    max_tokens: int
    workers: int
    ttft_p99_s: float


@dataclass(frozen=True, slots=True)
class FleetView:
    """What the routers that answered know together."""

    asked: int = 0
    answered: int = 0
    taken_at: float = 0.0  # monotonic
    workers: tuple[WorkerFacts, ...] = ()
    arrivals: int = 0
    held: int = 0
    remote: Way = Way()
    local: Way = Way()
    lanes: tuple[LaneFacts, ...] = ()
    models: frozenset[str] = frozenset()
    replies: tuple[Any, ...] = field(default=(), compare=False)  # FleetReply of each router
    silent: frozenset[str] = field(default=frozenset(), compare=False)  # addresses that did not answer


NOTHING_KNOWN = FleetView()


class FleetClient:
    """Asks routers. Connections are made for one question and closed: it is asked a few times a minute."""

    def __init__(self, *, timeout_s: float = CALL_TIMEOUT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s, self._clock = timeout_s, clock

    async def ask(self, addresses: Sequence[str], max_hold_s: float | None = None) -> FleetView:
        """One view from all routers at `addresses` (host:port). A router that does not answer in time is left out.

        `max_hold_s`: they are told that from now on no request waits longer for workers.
        """
        question = pb.FleetRequest(max_hold_s=max_hold_s)
        replies = await asyncio.gather(*(self._snapshot(address, question) for address in addresses))
        silent = frozenset(address for address, reply in zip(addresses, replies, strict=True) if reply is None)
        found = merge([reply for reply in replies if reply is not None], len(addresses), self._clock())
        return replace(found, silent=silent)

    async def _snapshot(self, address: str, question: pb.FleetRequest) -> Any | None:
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = pb_grpc.FleetStub(channel)  # type: ignore[no-untyped-call]
            try:
                return await stub.Snapshot(question, timeout=self._timeout_s)
            except grpc.aio.AioRpcError:
                return None


def merge(replies: Sequence[Any], asked: int, now: float) -> FleetView:
    """Several routers' words in one view."""
    newest: dict[str, WorkerFacts] = {}
    for reply in replies:
        for item in reply.workers:
            facts = _worker(item)
            known = newest.get(facts.incarnation)
            if known is None or facts.age_s < known.age_s:
                newest[facts.incarnation] = facts
    workers = tuple(sorted(newest.values(), key=lambda worker: (worker.role, worker.name, worker.incarnation)))
    return FleetView(
        asked=asked,
        answered=len(replies),
        taken_at=now,
        workers=workers,
        arrivals=sum(reply.arrivals for reply in replies),
        held=sum(reply.held for reply in replies),
        remote=_mean(reply.disaggregation.remote for reply in replies),
        local=_mean(reply.disaggregation.local for reply in replies),
        lanes=_lanes(replies),
        models=frozenset(model.name for reply in replies for model in reply.models),
        replies=tuple(replies),
    )


def _worker(item: Any) -> WorkerFacts:
    described, stats = item.description, item.stats
    return WorkerFacts(
        role=described.role,
        name=described.name,
        incarnation=described.incarnation,
        fingerprint=described.fingerprint,
        ready=item.ready,
        draining=stats.draining,
        age_s=item.stats_age_s,
        drain_eta_s=stats.drain_eta_s,
        links=tuple(LinkView(link.peer, link.state, link.reason) for link in stats.links),
    )


def _mean(ways: Iterable[Any]) -> Way:
    """Averages by weight."""
    found = [way for way in ways if way.weight > 0]
    total = sum(way.weight for way in found)
    if total <= 0:
        return Way()
    return Way(
        weight=total,
        ttft_s=sum(way.weight * way.ttft_s for way in found) / total,
        predicted_ttft_s=sum(way.weight * way.predicted_ttft_s for way in found) / total,
        other_ttft_s=sum(way.weight * way.other_ttft_s for way in found) / total,
    )


def _lanes(replies: Sequence[Any]) -> tuple[LaneFacts, ...]:
    """By name: the widest view of workers, the worst tail."""
    found: dict[str, LaneFacts] = {}
    for lane in (lane for reply in replies for lane in reply.lanes):
        known = found.get(lane.name)
        found[lane.name] = LaneFacts(
            name=lane.name,
            max_tokens=max(lane.max_tokens, known.max_tokens if known else 0),
            workers=max(lane.workers, known.workers if known else 0),
            ttft_p99_s=max(lane.ttft_p99_s, known.ttft_p99_s if known else 0.0),
        )
    return tuple(sorted(found.values(), key=lambda lane: (lane.max_tokens == 0, lane.max_tokens, lane.name)))
