"""The elector against a Lease that behaves as the API server's (optimistic locking), with time as the test wants it."""

import asyncio
import itertools
from copy import deepcopy
from typing import Any

import pytest

from lanewise.operator.cluster import ApiError, Fence, Fenced, Unavailable
from lanewise.operator.leader import Elector, LeaseTimes, LostLease

TIMES = LeaseTimes(duration_s=1.0, renew_deadline_s=0.6, retry_s=0.05)


class Server:
    """One Lease."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.versions = itertools.count(1)
        self.log: list[tuple[float, str]] = []


class Client:
    """A candidate's view of the server; `away` makes it unreachable."""

    def __init__(self, server: Server) -> None:
        self.server, self.fence, self.away = server, Fence(), False

    async def get(self, kind: str, namespace: str | None, name: str) -> dict[str, Any] | None:
        self._reach()
        return deepcopy(self.server.lease)

    async def create_unfenced(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self._reach()
        if self.server.lease is not None:
            raise ApiError(409, "AlreadyExists", "exists")
        return self._store(manifest)

    async def replace(self, manifest: dict[str, Any], *, fenced: bool = True) -> dict[str, Any]:
        if fenced:
            self.fence.check()
        self._reach()
        assert self.server.lease is not None
        if manifest["metadata"]["resourceVersion"] != self.server.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "modified")
        return self._store(manifest)

    def _reach(self) -> None:
        if self.away:
            raise Unavailable("away")

    def _store(self, manifest: dict[str, Any]) -> dict[str, Any]:
        kept = deepcopy(manifest)
        kept["metadata"]["resourceVersion"] = str(next(self.server.versions))
        self.server.lease = kept
        self.server.log.append((asyncio.get_running_loop().time(), kept["spec"]["holderIdentity"]))
        return deepcopy(kept)


def candidate(server: Server, name: str) -> tuple[Elector, Client]:
    client = Client(server)
    return Elector(client, "n", "l", name, TIMES), client


async def test_one_leads_and_the_other_waits() -> None:
    server = Server()
    first, _ = candidate(server, "a")
    second, _ = candidate(server, "b")
    await first.acquire()
    hold = asyncio.create_task(first.hold())
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * TIMES.duration_s):
                await second.acquire()
    finally:
        hold.cancel()
    assert {holder.partition("_")[0] for _, holder in server.log} == {"a"}


async def test_a_release_lets_the_other_in_at_once() -> None:
    server = Server()
    first, client = candidate(server, "a")
    second, _ = candidate(server, "b")
    await first.acquire()
    await first.release()
    with pytest.raises(Fenced):
        client.fence.check()
    async with asyncio.timeout(0.5):
        await second.acquire()
    assert server.lease is not None
    assert server.lease["spec"]["leaseTransitions"] == 1


async def test_who_cannot_renew_stops_before_another_may_start() -> None:
    server = Server()
    first, client = candidate(server, "a")
    second, _ = candidate(server, "b")
    await first.acquire()
    loop = asyncio.get_running_loop()
    hold = asyncio.create_task(first.hold())
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(0.2)
    client.away, lost_from = True, loop.time()
    with pytest.raises(LostLease):
        async with asyncio.timeout(5):
            await hold
    stopped = loop.time()
    assert stopped - lost_from <= TIMES.renew_deadline_s + 0.3
    with pytest.raises(Fenced):
        client.fence.check()
    async with asyncio.timeout(5):
        await waiting
    assert loop.time() > stopped


async def test_a_lease_taken_by_another_is_lost_at_once() -> None:
    server = Server()
    first, client = candidate(server, "a")
    await first.acquire()
    assert server.lease is not None
    server.lease["spec"]["holderIdentity"] = "somebody"
    server.lease["metadata"]["resourceVersion"] = "999"
    with pytest.raises(LostLease):
        async with asyncio.timeout(1):
            await first.hold()
    with pytest.raises(Fenced):
        client.fence.check()


async def test_an_answer_that_was_lost_is_no_lost_lease() -> None:
    server = Server()
    first, client = candidate(server, "a")
    await first.acquire()
    assert server.lease is not None
    server.lease["metadata"]["resourceVersion"] = "999"  # our own write went through, its answer did not
    hold = asyncio.create_task(first.hold())
    await asyncio.sleep(0.5)
    assert not hold.done()
    client.fence.check()
    hold.cancel()


async def test_nothing_is_written_after_the_deadline_even_by_one_who_was_stopped() -> None:
    """As after SIGSTOP: the clock has gone on, the process has not."""
    server = Server()
    client = Client(server)
    now = 100.0
    elector = Elector(client, "n", "l", "a", TIMES, clock=lambda: now)
    client.fence.clock = lambda: now
    await elector.acquire()
    now += 30.0
    with pytest.raises(LostLease):
        await elector.hold()
    assert len(server.log) == 1
    await elector.release()
    assert len(server.log) == 1
