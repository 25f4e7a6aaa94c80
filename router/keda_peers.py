"""What all routers of a service see together: every router asked at once, one second each.

Owns: the fan-out and how answers are put together (sums by router, workers by incarnation, newest first).
Must not: decide, or wait longer than its deadline for anyone; a router that does not answer is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
import structlog

from lanewise.router.discovery import Discovery
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc

DEADLINE_S = 1.0
DRAINED_S = 0.2  # for a closed channel's last words

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Whole:
    """The service as its routers see it."""

    routers: int
    held: int
    arrivals: int
    workers: tuple[pb.FleetWorker, ...]

    @property
    def under_way(self) -> int:
        """Requests that have not ended: held, or with a worker (counted once per worker that has them)."""
        return self.held + sum(worker.inflight for worker in self.workers)


def together(replies: list[pb.FleetReply]) -> Whole:
    """Each router once; of each worker the newest statistics, and what all routers have in flight there."""
    routers = {reply.router: reply for reply in replies}
    newest: dict[str, pb.FleetWorker] = {}
    inflight: dict[str, int] = {}
    for reply in routers.values():
        for worker in reply.workers:
            key = worker.description.incarnation
            inflight[key] = inflight.get(key, 0) + worker.inflight
            if key not in newest or worker.stats_age_s < newest[key].stats_age_s:
                newest[key] = worker
    workers = []
    for key, worker in sorted(newest.items()):
        summed = pb.FleetWorker()
        summed.CopyFrom(worker)
        summed.inflight = inflight[key]
        workers.append(summed)
    return Whole(
        len(routers),
        sum(reply.held for reply in routers.values()),
        sum(reply.arrivals for reply in routers.values()),
        tuple(workers),
    )


class Peers:
    """The other routers, wherever discovery says they are, and this one without a network between."""

    def __init__(self, local: Callable[[], Awaitable[pb.FleetReply]], discovery: Discovery | None) -> None:
        self._local, self._discovery = local, discovery
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def local(self) -> Whole:
        return together([await self._local()])

    async def ask(self, deadline_s: float = DEADLINE_S) -> Whole:
        """At most that long; the address of this router itself is asked too, and counted once."""
        answers = await asyncio.gather(*(self._ask(address, deadline_s) for address in list(self._channels)))
        return together([await self._local(), *(answer for answer in answers if answer is not None)])

    async def run(self) -> None:
        """Owned task: follows the addresses; never ends by itself."""
        try:
            if self._discovery is not None:
                async for addresses in self._discovery.watch():
                    await self._follow(frozenset(addresses))
            await asyncio.get_running_loop().create_future()
        finally:
            await self._follow(frozenset())

    async def _follow(self, addresses: frozenset[str]) -> None:
        for address in addresses - self._channels.keys():
            self._channels[address] = grpc.aio.insecure_channel(address)
        for address in self._channels.keys() - addresses:
            await self._channels.pop(address).close(grace=DRAINED_S)

    async def _ask(self, address: str, deadline_s: float) -> pb.FleetReply | None:
        stub = pb_grpc.FleetStub(self._channels[address])  # type: ignore[no-untyped-call]
        try:
            reply: pb.FleetReply = await stub.Snapshot(pb.FleetRequest(), timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            log.warning("router_not_answering", address=address, code=error.code().name)
            return None
        return reply
