"""The decode side of the KV channel, as a worker's loop sees it: commands that any thread may give.

Owns: checking what a command says before it crosses to the transfer thread. Must not: touch sockets or pages
(`receiver_thread.py` does), or decide anything about a transfer (`receiver_core.py` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lanewise.policy.blocks import UNIT_TOKENS
from lanewise.transfer.faults import Faults
from lanewise.transfer.keys import Security
from lanewise.transfer.receiver_thread import ReceiverThread
from lanewise.transfer.records import (
    Binding,
    Counters,
    Endpoint,
    Key,
    Limits,
    Pages,
    PageStore,
    ReceiverEvent,
    Timers,
    checked_key,
    packed_ids,
)


class Receiver:
    def __init__(
        self,
        identity: Endpoint,
        store: PageStore,
        on_event: Callable[[ReceiverEvent], None],
        faults: Faults | None = None,
        *,
        listen: str = "tcp://127.0.0.1:0",
        timers: Timers | None = None,
        limits: Limits | None = None,
        security: Security | None = None,
        group_host: str = "",
        group_device: str = "cpu",
        data_listen: str = "",
        direct: bool = True,
    ) -> None:
        """`data_listen`: where data goes with `Authenticated`; default: the port after that of control. Without
        encryption, where direct connections arrive; default: any free port. `direct`: whether they are taken at all.
        `group_host`: this host's name towards partners; where set, data is taken by process groups too, through
        the memory of `group_device`."""
        settings = (timers or Timers(), limits or Limits(), security or Security())
        self._thread = ReceiverThread(identity, store, on_event, faults, *settings)
        self._listen, self._data_listen = listen, data_listen
        self._group_host, self._group_device = group_host, group_device
        self._direct = direct and not settings[2].on and not group_host

    def start(self) -> str:
        """Binds, starts, and returns the endpoint with its real port."""
        endpoint = self._thread.bind(self._listen, self._data_listen)
        if self._group_host:
            self._thread.use_groups(self._group_host, self._group_device)
        if self._direct:
            self._thread.use_direct(self._data_listen or f"{self._listen.rpartition(':')[0]}:0")
        self._thread.start_thread()
        return endpoint

    def close(self, timeout: float = 2.0) -> None:
        self._thread.join(timeout)

    def expect(self, key: Key, ids: Sequence[int], cache_key: bytes) -> None:
        """Submit arrived: KV under this name must be of exactly these ids."""
        thread, key, packed = self._thread, checked_key(key), packed_ids(ids)
        thread.command(lambda now: thread.expect(key, Binding.of(packed, cache_key), now))

    def grant(self, key: Key, pages: Pages, have_tokens: int) -> None:
        """Answers Offered: these pages take ids[have_tokens:]; the first `have_tokens` (a multiple of 64) are held."""
        if have_tokens < 0 or have_tokens % UNIT_TOKENS:
            raise ValueError(f"have_tokens must be a multiple of {UNIT_TOKENS}, not {have_tokens}")
        thread = self._thread
        thread.command(lambda now: thread.perform(thread.core.grant(key, pages, have_tokens, now)))

    def refuse(self, key: Key, busy: bool, reason: str, retry_after_s: float = 0.5) -> None:
        """Answers Offered with no. The transfer has ended; no event follows."""
        thread = self._thread
        thread.command(lambda now: thread.perform(thread.core.refuse(key, busy, reason, retry_after_s, now)))

    def cancel(self, key: Key, reason: str) -> None:
        """Ends a transfer in whatever state; Drained follows when no copy is under way, always."""
        thread = self._thread
        thread.command(lambda now: thread.perform(thread.core.cancel(key, reason, now)))

    def snapshot(self) -> Counters:
        return replace(self._thread.counters)
