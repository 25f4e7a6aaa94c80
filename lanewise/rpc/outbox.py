"""From the engine thread to the routers: tokens, failures, statistics and cache events of a worker.

Owns: collecting what one engine step produced and handing it to the asyncio thread in a single call.
Must not: block the engine thread, or touch gRPC objects (they stay on the asyncio thread).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from lanewise.fleet import WorkerStats
from lanewise.request import Failure, Token
from lanewise.rpc import convert
from lanewise.rpc import lanewise_pb2 as pb


@dataclass(slots=True)
class Batch:
    """Everything one engine step has to say, in order, each item with the session it is for."""

    items: list[tuple[str, pb.WorkerMessage | Token]] = field(default_factory=list)
    stats: WorkerStats | None = None
    blocks_added: list[bytes] = field(default_factory=list)
    blocks_removed: list[bytes] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.items or self.stats or self.blocks_added or self.blocks_removed)


class Outbox:
    """Filled by one thread (the engine's), emptied on the asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Batch], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._batch = Batch()

    def token(self, session: str, token: Token) -> None:
        self._batch.items.append((session, token))

    def failed(self, session: str, failure: Failure) -> None:
        self._batch.items.append((session, pb.WorkerMessage(failed=convert.failure_to_wire(failure))))

    def accepted(self, session: str, key: tuple[str, int], cached_tokens: int) -> None:
        message = pb.SubmitAccepted(request_id=key[0], epoch=key[1], cached_tokens=cached_tokens)
        self._batch.items.append((session, pb.WorkerMessage(accepted=message)))

    def committed(self, session: str, key: tuple[str, int], received_tokens: int, received_bytes: int) -> None:
        message = pb.Committed(
            request_id=key[0], epoch=key[1], received_tokens=received_tokens, received_bytes=received_bytes
        )
        self._batch.items.append((session, pb.WorkerMessage(committed=message)))

    def transfer_failed(self, session: str, key: tuple[str, int], reason: str, fingerprint_mismatch: bool) -> None:
        message = pb.TransferFailed(
            request_id=key[0], epoch=key[1], reason=reason, fingerprint_mismatch=fingerprint_mismatch
        )
        self._batch.items.append((session, pb.WorkerMessage(transfer_failed=message)))

    def stats(self, stats: WorkerStats) -> None:
        self._batch.stats = stats

    def blocks(self, added: list[bytes], removed: list[bytes]) -> None:
        self._batch.blocks_added += added
        self._batch.blocks_removed += removed

    def flush(self) -> None:
        """Hand over everything collected since the last call. Silent when the loop has already closed."""
        if not self._batch:
            return
        batch, self._batch = self._batch, Batch()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, batch)
