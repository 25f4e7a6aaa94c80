"""Who holds which KV page: sequences, the prefix cache, nobody. Pure bookkeeping.

Owns: the free list, references, the prefix cache in units of 64 tokens keyed by chained hashes, and its LRU eviction.
Must not: import torch, touch KV bytes, or decide whom to preempt (the worker loop does when `ensure` says no).

Invariants, all checked by `audit`:
- every page is in exactly one place: free, in one cached unit, or private to one lease;
- a lease refers to a chain: whoever refers to a unit refers to all its ancestors, so unreferenced units are closed
  under descent and can all be evicted, leaves first;
- a referenced unit's pages are used by at least one lease. A lease that computed a unit which another had cached first
  keeps its own copy (its pages may be lent to a transfer) and is a *shadow* of that unit; when the last real user
  goes, the unit takes over a shadow's copy, so no page is pinned without a user.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from lanewise.engine.audit import audit
from lanewise.engine.sequence import Sequence, no_pages
from lanewise.policy.blocks import UNIT_TOKENS, chain_hashes

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Tokens by state; what is neither used nor cached is free."""

    used_tokens: int  # in pages that some sequence holds
    cached_tokens: int  # in units of the prefix cache that no sequence refers to
    capacity_tokens: int


@dataclass(slots=True)
class Unit:
    """64 cached tokens. `holders` refer to it, `shadows` among them use a private copy instead of `pages`."""

    digest: bytes
    parent: bytes | None
    pages: array[int]
    holders: set[Key] = field(default_factory=set)
    shadows: set[Key] = field(default_factory=set)
    num_children: int = 0
    last_used: int = 0


@dataclass(slots=True)
class Lease:
    """What one sequence holds: its pages, and the first `num_sealed` units of its chain by reference."""

    seq: Sequence
    digests: list[bytes] = field(default_factory=list)  # as far as computed; at least num_sealed
    num_sealed: int = 0


class PageTable:
    """Bookkeeping for `num_pages` pages of `page_tokens` tokens; one thread only."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if UNIT_TOKENS % page_tokens:
            raise ValueError(f"{page_tokens} tokens per page do not divide {UNIT_TOKENS}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.unit_pages = UNIT_TOKENS // page_tokens
        self.free = list(range(num_pages - 1, -1, -1))  # a stack: low pages first, freed ones reused while warm
        self.units: dict[bytes, Unit] = {}
        self.leases: dict[Key, Lease] = {}
        self.num_idle = 0  # units without holders
        self._leaves: list[tuple[int, bytes]] = []  # heap of (last_used, digest); entries may be stale
        self._tick = 0
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    # -- the prefix cache ------------------------------------------------------------------------------------------

    def match(self, ids: Seq[int], key: bytes) -> int:
        """Cached leading tokens: a multiple of 64, less than len(ids), since the last token must be computed anyway."""
        return self._match(chain_hashes(ids, key), len(ids)) * UNIT_TOKENS

    def attach(self, seq: Sequence, key: bytes) -> int:
        """Gives `seq`, which must hold nothing, the cached prefix of its ids; returns its tokens."""
        lease = self._lease(seq)
        if seq.pages or seq.num_computed:
            raise ValueError(f"sequence {seq.key} already has pages")
        lease.digests = chain_hashes(seq.ids, key)
        num_units = self._match(lease.digests, len(seq.ids))
        for digest in lease.digests[:num_units]:
            unit = self.units[digest]
            self._hold(unit, seq.key)
            seq.pages.extend(unit.pages)
        lease.num_sealed = num_units
        seq.num_computed = seq.cached_tokens = num_units * UNIT_TOKENS
        return seq.cached_tokens

    def seal(self, seq: Sequence, key: bytes) -> None:
        """Puts the fully computed units of `seq` into the prefix cache; it keeps its pages either way."""
        num_full = seq.num_computed // UNIT_TOKENS
        lease = self._lease(seq)
        if num_full <= lease.num_sealed:
            return
        if len(lease.digests) < num_full:
            lease.digests = chain_hashes(seq.ids[: num_full * UNIT_TOKENS], key)
        for index in range(lease.num_sealed, num_full):
            digest = lease.digests[index]
            unit = self.units.get(digest)
            if unit is None:
                unit = self._add_unit(lease, index)
            elif unit.holders:
                unit.shadows.add(seq.key)
            else:
                self._replace_pages(unit, lease, index)
            self._hold(unit, seq.key)
        lease.num_sealed = num_full

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """Units (added, removed) since the last call, net: a unit that came and went is in neither."""
        events = list(self._added), list(self._removed)
        self._added, self._removed = {}, {}
        return events

    def snapshot(self) -> list[bytes]:
        """All cached units, parents before children."""
        return list(self.units)

    # -- pages of sequences ----------------------------------------------------------------------------------------

    def ensure(self, seq: Sequence, tokens: int) -> bool:
        """Pages for ids[0:tokens], evicting unreferenced cache if need be. False: does not fit, nothing was taken."""
        missing = -(-tokens // self.page_tokens) - len(seq.pages)
        if missing <= 0:
            return True
        if missing > len(self.free) + self.num_idle * self.unit_pages:
            return False
        while len(self.free) < missing:
            self._evict_one()
        self._lease(seq)
        seq.pages.extend(self.free.pop() for _ in range(missing))
        return True

    def release(self, seq: Sequence) -> None:
        """Takes everything from `seq`: sealed units stay cached, the rest is free. The sequence starts anew at 0."""
        lease = self.leases.pop(seq.key, None)
        if lease is not None:
            self.free.extend(reversed(self._private_pages(lease)))
            self._tick += 1
            # Deepest first, so that a unit without holders never has a child with holders.
            for index in range(lease.num_sealed - 1, -1, -1):
                self._let_go(self.units[lease.digests[index]], seq)
        seq.pages = no_pages()
        seq.num_computed = seq.cached_tokens = 0

    def usage(self) -> PoolUsage:
        cached_pages = self.num_idle * self.unit_pages
        used_pages = self.num_pages - len(self.free) - cached_pages
        return PoolUsage(
            used_tokens=used_pages * self.page_tokens,
            cached_tokens=cached_pages * self.page_tokens,
            capacity_tokens=self.num_pages * self.page_tokens,
        )

    def audit(self, live: Iterable[Sequence]) -> list[str]:
        """Every inconsistency and leak, in words; empty means sound. `live`: all sequences that may hold pages."""
        return audit(self, list(live))

    def is_offered(self, unit: Unit) -> bool:
        """Whether the eviction heap knows the unit; for the audit."""
        return (unit.last_used, unit.digest) in self._leaves

    # -- inside ----------------------------------------------------------------------------------------------------

    def _match(self, digests: list[bytes], num_ids: int) -> int:
        """Leading units that are cached and leave at least one id to compute."""
        limit = max(0, num_ids - 1) // UNIT_TOKENS
        matched = 0
        while matched < limit and digests[matched] in self.units:
            matched += 1
        return matched

    def _lease(self, seq: Sequence) -> Lease:
        lease = self.leases.get(seq.key)
        if lease is None:
            lease = self.leases[seq.key] = Lease(seq)
        elif lease.seq is not seq:
            raise ValueError(f"two sequences have the key {seq.key}")
        return lease

    def _unit_slice(self, index: int) -> slice:
        return slice(index * self.unit_pages, (index + 1) * self.unit_pages)

    def _private_pages(self, lease: Lease) -> array[int]:
        """Pages of the lease that are in no unit: copies it shadows, and everything past its sealed chain."""
        pages = lease.seq.pages[lease.num_sealed * self.unit_pages :]
        for index, digest in enumerate(lease.digests[: lease.num_sealed]):
            if lease.seq.key in self.units[digest].shadows:
                pages = pages + lease.seq.pages[self._unit_slice(index)]
        return pages

    def _add_unit(self, lease: Lease, index: int) -> Unit:
        parent = lease.digests[index - 1] if index else None
        unit = Unit(lease.digests[index], parent, lease.seq.pages[self._unit_slice(index)])
        self.units[unit.digest] = unit
        self.num_idle += 1  # until the caller holds it
        if parent is not None:
            self.units[parent].num_children += 1
        if unit.digest in self._removed:
            del self._removed[unit.digest]
        else:
            self._added[unit.digest] = None
        return unit

    def _hold(self, unit: Unit, key: Key) -> None:
        if not unit.holders:
            self.num_idle -= 1
        unit.holders.add(key)

    def _let_go(self, unit: Unit, seq: Sequence) -> None:
        unit.holders.discard(seq.key)
        if seq.key in unit.shadows:
            unit.shadows.discard(seq.key)
        elif unit.shadows and len(unit.shadows) == len(unit.holders):
            self._adopt(unit)
        unit.last_used = self._tick
        if not unit.holders:
            self.num_idle += 1
            self._offer(unit)

    def _adopt(self, unit: Unit) -> None:
        """The last user of the unit's own pages has gone: a shadow's copy takes their place."""
        heir = self.leases[min(unit.shadows)]
        unit.shadows.discard(heir.seq.key)
        self._replace_pages(unit, heir, heir.digests.index(unit.digest))

    def _replace_pages(self, unit: Unit, lease: Lease, index: int) -> None:
        """The unit's own pages, which nobody uses, become free; the lease's copy of unit `index` is cached instead."""
        self.free.extend(reversed(unit.pages))
        unit.pages = lease.seq.pages[self._unit_slice(index)]

    def _offer(self, unit: Unit) -> None:
        """Makes the unit evictable if it is an unreferenced leaf."""
        if unit.holders or unit.num_children:
            return
        if len(self._leaves) > 2 * len(self.units) + 64:  # a hot prefix leaves one stale entry per use
            self._leaves = [entry for entry in self._leaves if self._is_evictable(*entry)]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (unit.last_used, unit.digest))

    def _is_evictable(self, last_used: int, digest: bytes) -> bool:
        unit = self.units.get(digest)
        return unit is not None and not unit.holders and not unit.num_children and unit.last_used == last_used

    def _evict_one(self) -> None:
        """Frees the least recently used unreferenced leaf. The caller knows that there is one."""
        last_used, digest = heapq.heappop(self._leaves)
        while not self._is_evictable(last_used, digest):
            last_used, digest = heapq.heappop(self._leaves)
        unit = self.units.pop(digest)
        self.num_idle -= 1
        self.free.extend(reversed(unit.pages))
        if digest in self._added:
            del self._added[digest]
        else:
            self._removed[digest] = None
        if unit.parent is not None:
            parent = self.units[unit.parent]
            parent.num_children -= 1
            self._offer(parent)
