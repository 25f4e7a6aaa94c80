"""The prefill side of the KV channel, as a worker's loop sees it: commands that any thread may give.

Owns: checking what a command says before it crosses to the transfer thread. Must not: touch sockets or pages
(`sender_thread.py` does), or decide anything about a transfer (`sender_core.py` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lanewise.request import Token
from lanewise.transfer.faults import Faults
from lanewise.transfer.keys import Security
from lanewise.transfer.records import (
    Binding,
    Counters,
    Endpoint,
    Key,
    Limits,
    Pages,
    PageStore,
    Peer,
    SenderEvent,
    Timers,
    checked_key,
    packed_ids,
)
from lanewise.transfer.sender_thread import SenderThread
from lanewise.transfer.trial import References


class Sender:
    def __init__(
        self,
        identity: Endpoint,
        store: PageStore,
        on_event: Callable[[SenderEvent], None],
        faults: Faults | None = None,
        *,
        timers: Timers | None = None,
        limits: Limits | None = None,
        security: Security | None = None,
        group_host: str = "",
        group_device: str = "cpu",
        direct: bool = True,
        references: References = References.AUTO,
    ) -> None:
        """`direct`: whether chunks go by direct connections where nothing is encrypted and the partner takes them.
        `references`: whether a partner on this host may read them from this process's memory instead.
        `group_host`: this host's name towards partners; where set, data goes by process groups (channel NCCL),
        through the memory of `group_device`."""
        settings = (timers or Timers(), limits or Limits(), security or Security())
        self._thread = SenderThread(identity, store, on_event, faults, *settings)
        self._group_host, self._group_device, self._references = group_host, group_device, references
        self._direct = direct and not settings[2].on and not group_host

    def start(self) -> None:
        if self._group_host:
            self._thread.use_groups(self._group_host, self._group_device)
        if self._direct:
            self._thread.use_direct(self._references)
        self._thread.start_thread()

    def close(self, timeout: float = 2.0) -> None:
        """Aborts what lives, waits up to `timeout` for the partners to know, and ends the thread."""
        self._thread.join(timeout)

    def connect(self, peer: Peer) -> None:
        """Greets and tests the link; a LinkReport follows."""
        thread = self._thread
        thread.check(peer)
        thread.command(lambda now: thread.perform(thread.core.connect(peer, now), now))

    def begin(self, key: Key, peer: Peer, ids: Sequence[int], cache_key: bytes, pages: Pages) -> None:
        """Offers the KV of exactly these ids; from now on one of Delivered, Busy, Aborted ends the transfer."""
        thread, key, packed = self._thread, checked_key(key), packed_ids(ids)
        thread.check(peer)
        thread.command(lambda now: thread.begin(key, peer, Binding.of(packed, cache_key), pages, now))

    def ready(self, key: Key, tokens: int, layers: range | None = None) -> None:
        """KV of ids[0:tokens] is in the pool, in all layers or in these."""
        self._thread.command(lambda now: self._thread.core.ready(key, tokens, layers))

    def commit(self, key: Key, token: Token) -> None:
        """All KV is in the pool and token 1 has been sampled."""
        thread = self._thread
        thread.command(lambda now: thread.perform(thread.core.commit(key, token, now), now))

    def abort(self, key: Key, reason: str) -> None:
        """Ends a transfer; Aborted follows unless it had ended already."""
        thread = self._thread
        thread.command(lambda now: thread.perform(thread.core.abort(key, reason, now), now))

    def snapshot(self) -> Counters:
        return replace(self._thread.counters)
