"""The page table's own accountant: states every inconsistency and leak in words.

Owns: the checks. Must not: repair anything, or be needed for the table to work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lanewise.engine.sequence import Sequence
from lanewise.policy.blocks import UNIT_TOKENS

if TYPE_CHECKING:
    from lanewise.engine.pages import Lease, PageTable


def audit(table: PageTable, live: list[Sequence]) -> list[str]:
    """Empty means sound. A sequence that holds pages and is not in `live` is a leak."""
    return [*_leaks(table, live), *_places(table), *_chains(table), *_counts(table)]


def _leaks(table: PageTable, live: list[Sequence]) -> Iterator[str]:
    keys = {seq.key for seq in live}
    for key, lease in table.leases.items():
        if key not in keys and (lease.seq.pages or lease.num_sealed):
            yield f"leak: {key} holds {len(lease.seq.pages)} pages and is not live"
    for seq in live:
        lease_of_key = table.leases.get(seq.key)
        if seq.pages and (lease_of_key is None or lease_of_key.seq is not seq):
            yield f"sequence {seq.key} has pages without a lease"
        if seq.num_computed > len(seq.pages) * table.page_tokens:
            yield f"sequence {seq.key} has computed {seq.num_computed} tokens in {len(seq.pages)} pages"


def _places(table: PageTable) -> Iterator[str]:
    """Every page in exactly one place."""
    places: Counter[int] = Counter(table.free)
    for unit in table.units.values():
        places.update(unit.pages)
    for lease in table.leases.values():
        places.update(_private_pages(table, lease))
    for page in range(table.num_pages):
        if places[page] != 1:
            yield f"page {page} is in {places[page]} places"
    for page in places.keys() - set(range(table.num_pages)):
        yield f"page {page} does not exist"


def _private_pages(table: PageTable, lease: Lease) -> Iterator[int]:
    for position, page in enumerate(lease.seq.pages):
        index = position // table.unit_pages
        if index >= lease.num_sealed or lease.seq.key in table.units[lease.digests[index]].shadows:
            yield page


def _chains(table: PageTable) -> Iterator[str]:
    """Leases and units agree on who refers to what, and chains are complete."""
    referred: dict[bytes, set[tuple[str, int]]] = {digest: set() for digest in table.units}
    for key, lease in table.leases.items():
        for index, digest in enumerate(lease.digests[: lease.num_sealed]):
            unit = table.units.get(digest)
            if unit is None:
                yield f"{key} refers to unit {index}, which is not cached"
                continue
            referred[digest].add(key)
            pages = lease.seq.pages[index * table.unit_pages : (index + 1) * table.unit_pages]
            if (pages == unit.pages) == (key in unit.shadows):
                yield f"{key} unit {index}: pages and shadow mark disagree"
            if lease.seq.num_computed < (index + 1) * UNIT_TOKENS:
                yield f"{key} unit {index} is sealed and not computed"
    for digest, unit in table.units.items():
        name = digest.hex()[:8]
        if unit.holders != referred[digest]:
            yield f"unit {name} counts holders {sorted(unit.holders)}, leases say {sorted(referred[digest])}"
        if unit.shadows - unit.holders:
            yield f"unit {name} has shadows that do not hold it"
        if unit.holders and unit.shadows == unit.holders:
            yield f"unit {name} is pinned and nobody uses its pages"
        if unit.parent is not None:
            parent = table.units.get(unit.parent)
            if parent is None:
                yield f"unit {name} has lost its parent"
            elif unit.holders - parent.holders:
                yield f"unit {name} is held by sequences that do not hold its parent"


def _counts(table: PageTable) -> Iterator[str]:
    idle = sum(not unit.holders for unit in table.units.values())
    if idle != table.num_idle:
        yield f"{table.num_idle} idle units counted, {idle} found"
    children = Counter(unit.parent for unit in table.units.values())
    for digest, unit in table.units.items():
        if unit.num_children != children[digest]:
            yield f"unit {digest.hex()[:8]} counts {unit.num_children} children, {children[digest]} found"
        if len(unit.pages) != table.unit_pages:
            yield f"unit {digest.hex()[:8]} has {len(unit.pages)} pages"
        if not unit.holders and not unit.num_children and not table.is_offered(unit):
            yield f"unit {digest.hex()[:8]} is evictable and not offered for eviction"
