"""What waits to be written to one router: one bounded queue per session, in the order that is promised.

Owns: that order (tokens and endings first, then cache events, then the latest statistics) and the bound.
Must not: write (serve.py does).
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from lanewise.fleet import WorkerStats
from lanewise.request import Token
from lanewise.rpc import convert
from lanewise.rpc import lanewise_pb2 as pb

MAX_QUEUED = 65_536  # messages; tokens are grouped, so this is far beyond any healthy session

Peer = tuple[str, str, str]
"""A decode worker: KV address, incarnation, fingerprint."""


@dataclass(slots=True)
class SessionQueue:
    """One router's stream. `queue` is first in, first out, since the order of tokens and endings is a promise."""

    id: str
    router: str
    queue: deque[pb.WorkerMessage | list[Token]] = field(default_factory=deque)
    stats: WorkerStats | None = None
    blocks: deque[pb.WorkerMessage] = field(default_factory=deque)
    block_number: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    peers: tuple[Peer, ...] = ()
    closing: bool = False  # ends when everything in it is written

    def put(self, message: pb.WorkerMessage) -> None:
        self.queue.append(message)
        self.wake.set()

    def put_tokens(self, tokens: list[Token]) -> None:
        """Tokens of several steps that wait together leave in one message."""
        if self.queue and isinstance(self.queue[-1], list):
            self.queue[-1].extend(tokens)
        else:
            self.queue.append(list(tokens))
        self.wake.set()

    def put_blocks(self, snapshot: bool, added: list[bytes], removed: list[bytes]) -> None:
        event = pb.BlockEvents(
            number=self.block_number, snapshot=snapshot, added=b"".join(added), removed=b"".join(removed)
        )
        self.block_number += 1
        self.blocks.append(pb.WorkerMessage(blocks=event))
        self.wake.set()

    @property
    def overflow(self) -> bool:
        return len(self.queue) + len(self.blocks) > MAX_QUEUED

    def take(self) -> pb.WorkerMessage | None:
        """The next message to write: tokens and endings first, then cache events, then the latest statistics."""
        if self.queue:
            head = self.queue.popleft()
            return pb.WorkerMessage(step=convert.tokens_to_wire(head)) if isinstance(head, list) else head
        if self.blocks:
            return self.blocks.popleft()
        if self.stats is not None:
            stats, self.stats = self.stats, None
            return pb.WorkerMessage(stats=convert.stats_to_wire(stats))
        return None
