"""Which of several operators works: an elector on a `coordination.k8s.io/Lease`.

Owns: acquiring, renewing and releasing the Lease, and the fence that all writes are held against.
Must not: know what the leader does. Another holder's time is judged by our own clock from when we saw it renew, so
clocks of nodes need not agree.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from lanewise.operator.cluster import ApiError, Fence, Fenced, Unavailable

log = structlog.get_logger(__name__)


class Leases(Protocol):
    """What the elector needs of a cluster."""

    fence: Fence

    async def get(self, kind: str, namespace: str | None, name: str) -> dict[str, Any] | None: ...
    async def create_unfenced(self, manifest: dict[str, Any]) -> dict[str, Any]: ...
    async def replace(self, manifest: dict[str, Any], *, fenced: bool = True) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """duration > renew deadline + the timeout of one request, or a write could land in the next holder's time."""

    duration_s: float = 10.0
    renew_deadline_s: float = 6.0
    retry_s: float = 1.0


class LostLease(Exception):
    """This process was the leader and is not any more."""


class Elector:
    """One candidate. `acquire()`, then `hold()` until it raises LostLease or is cancelled, then `release()`."""

    def __init__(
        self,
        cluster: Leases,
        namespace: str,
        name: str,
        pod: str,
        times: LeaseTimes,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster, self._namespace, self._name, self._times = cluster, namespace, name, times
        self._clock, self._now = clock, now
        self.identity = f"{pod}_{uuid.uuid4()}"
        self._lease: dict[str, Any] | None = None  # as last read or written
        self._seen: tuple[Any, ...] = ()  # of another holder's Lease
        self._seen_at = 0.0
        self.leading = False

    async def acquire(self) -> None:
        """Returns once this process holds the Lease."""
        while not await self._try(self._take):  # noqa: ASYNC110  # the other holder is another process
            await asyncio.sleep(self._times.retry_s)
        self.leading = True
        log.info("leading", lease=f"{self._namespace}/{self._name}", identity=self.identity)

    async def hold(self) -> None:
        """Renews until it cannot; then raises LostLease, at the latest when the renew deadline passes."""
        fence = self._cluster.fence
        while True:
            await asyncio.sleep(min(self._times.retry_s, max(0.0, fence.deadline - self._clock())))
            if self._clock() >= fence.deadline:
                self.leading = False
                raise LostLease(f"no renewal for {self._times.renew_deadline_s:g} s")
            try:
                async with asyncio.timeout(max(0.01, fence.deadline - self._clock())):
                    await self._renew()
            except (Unavailable, TimeoutError) as error:
                log.warning("lease_not_renewed", error=str(error), left_s=round(fence.deadline - self._clock(), 1))
            except ApiError as error:
                if error.status == 409 and await self._still_ours():
                    continue  # our own earlier write arrived after its answer was given up
                self.leading = False
                fence.deadline = 0.0
                raise LostLease(str(error)) from error

    async def release(self) -> None:
        """Let another take over at once. Best effort: a Lease that is not released runs out."""
        if self._lease is None or not self.leading:
            return
        self.leading = False
        await self._try(self._give_up)

    # ------------------------------------------------------------ steps

    async def _take(self) -> bool:
        lease = await self._cluster.get("Lease", self._namespace, self._name)
        started = self._clock()
        if lease is None:
            self._lease = await self._cluster.create_unfenced(self._manifest(None))
        elif self._is_free(lease):
            self._lease = await self._cluster.replace(self._manifest(lease), fenced=False)
        else:
            return False
        self._cluster.fence.deadline = started + self._times.renew_deadline_s
        return True

    async def _renew(self) -> None:
        assert self._lease is not None  # acquire() comes first
        # Counted from before the request: the API server may stamp it any time until the answer.
        started = self._clock()
        self._lease = await self._cluster.replace(self._manifest(self._lease))
        self._cluster.fence.deadline = started + self._times.renew_deadline_s

    async def _give_up(self) -> bool:
        lease = self._manifest(self._lease)
        lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
        self._lease = await self._cluster.replace(lease)
        self._cluster.fence.deadline = 0.0
        log.info("lease_released", lease=f"{self._namespace}/{self._name}")
        return True

    async def _still_ours(self) -> bool:
        lease = await self._cluster.get("Lease", self._namespace, self._name)
        if lease is None or lease["spec"].get("holderIdentity") != self.identity:
            return False
        self._lease = lease
        return True

    def _is_free(self, lease: dict[str, Any]) -> bool:
        """Released, or not renewed for its duration while we looked on."""
        spec = lease.get("spec", {})
        holder = spec.get("holderIdentity")
        if not holder or holder == self.identity:
            return True
        seen = (holder, spec.get("renewTime"), spec.get("leaseTransitions"))
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()
            return False
        return self._clock() - self._seen_at >= float(spec.get("leaseDurationSeconds") or self._times.duration_s)

    def _manifest(self, lease: dict[str, Any] | None) -> dict[str, Any]:
        old = (lease or {}).get("spec", {})
        taken = old.get("holderIdentity") != self.identity
        stamp = self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        metadata = {"name": self._name, "namespace": self._namespace}
        if lease is not None:
            metadata = lease["metadata"]
        spec = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": round(self._times.duration_s),
            "acquireTime": stamp if taken else old.get("acquireTime"),
            "renewTime": stamp,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (1 if taken and lease is not None else 0),
        }
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}

    async def _try(self, step: Callable[[], Any]) -> bool:
        try:
            return bool(await step())
        except (Unavailable, Fenced) as error:
            log.warning("lease_unavailable", error=str(error))
        except ApiError as error:
            if error.status != 409:  # somebody else was faster
                log.warning("lease_refused", error=str(error))
        return False
