"""Where the workers are: a source of address sets, level-triggered.

Owns: the interface that every source of addresses has, and the static list.
Must not: connect to anything. An address is only a place to look; who is there is learned from `Describe`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol


class Discovery(Protocol):
    def watch(self) -> AsyncIterator[frozenset[str]]:
        """Yields the complete set of addresses whenever it changes; never ends by itself."""
        ...


class StaticDiscovery:
    """The addresses of `RouterConfig.workers`."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self._addresses = frozenset(addresses)

    async def watch(self) -> AsyncIterator[frozenset[str]]:
        yield self._addresses
        await asyncio.get_running_loop().create_future()  # until the owner cancels
