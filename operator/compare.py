"""Whether an object in the cluster is still what we want: so that nothing is sent when nothing has changed.

Owns: comparing the fields we set, and only those, against a live object that others have added defaults to.
Must not: call the API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lanewise.operator.names import APPLIED_HASH
from lanewise.operator.plan_config import short_hash
from lanewise.spec_types import Quantity

EXACT_KINDS = frozenset({"NetworkPolicy", "RoleBinding"})
"""Every list of these is ours as a whole: an entry that somebody added opens a door."""
QUANTITIES = frozenset({"limits", "requests", "sizeLimit"})
LIST_KEYS = (
    ("uid",),
    ("name",),
    ("mountPath",),
    ("containerPort", "protocol"),
    ("topologyKey", "whenUnsatisfiable"),
)


def applied_hash(manifest: Mapping[str, Any]) -> str:
    """Of what we want, kept on the object: tells that a field was dropped, which no comparison of fields can."""
    return short_hash(manifest)


def stamped(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it is sent, with its own hash as an annotation."""
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), APPLIED_HASH: applied_hash(manifest)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def differences(wanted: Mapping[str, Any], live: Mapping[str, Any] | None) -> list[str]:
    """Paths at which `live` is not what `wanted` says; empty where no write is needed. Both without the stamp."""
    if live is None:
        return ["missing"]
    found = list(_mapping(wanted, live, "", wanted["kind"] in EXACT_KINDS))
    if live["metadata"].get("annotations", {}).get(APPLIED_HASH) != applied_hash(wanted):
        found.append(f"metadata.annotations.{APPLIED_HASH}")
    return found


def _mapping(wanted: Mapping[str, Any], live: Mapping[str, Any], path: str, exact: bool) -> list[str]:
    found: list[str] = []
    for name, value in wanted.items():
        here = f"{path}.{name}" if path else name
        if name in QUANTITIES and isinstance(value, Mapping):
            other = live.get(name)
            other = other if isinstance(other, Mapping) else {}
            found += [f"{here}.{part}" for part in value if not _same_quantity(value[part], other.get(part))]
        elif name in QUANTITIES:
            found += [] if _same_quantity(value, live.get(name)) else [here]
        else:
            found += _value(value, live.get(name), here, exact)
    return found


def _value(wanted: Any, live: Any, path: str, exact: bool) -> list[str]:
    if isinstance(wanted, Mapping):
        # An empty mapping that we set and a missing one mean the same to the API server (emptyDir keeps its key).
        if not isinstance(live, Mapping):
            return [] if not wanted and live is None else [path]
        return _mapping(wanted, live, path, exact)
    if isinstance(wanted, list | tuple):
        return _list(wanted, live, path, exact)
    if wanted == live or (live is None and wanted in ("", False)):
        return []
    return [path]


def _list(wanted: Sequence[Any], live: Any, path: str, exact: bool) -> list[str]:
    live = live if isinstance(live, list) else []
    key = _key_of([*wanted, *live]) if not exact else None
    if key is None:
        if len(wanted) != len(live):
            return [path]
        pairs = zip(wanted, live, strict=True)
        return [problem for index, (a, b) in enumerate(pairs) for problem in _value(a, b, f"{path}[{index}]", exact)]
    others = {tuple(item.get(name) for name in key): item for item in live}
    found: list[str] = []
    for item in wanted:
        name = tuple(item.get(part) for part in key)
        here = f"{path}[{','.join(map(str, name))}]"
        found += _value(item, others[name], here, exact) if name in others else [here]
    return found


def _key_of(items: Sequence[Any]) -> tuple[str, ...] | None:
    """The fields that tell the elements of a list apart, where the API merges it by such fields."""
    if not items or not all(isinstance(item, Mapping) for item in items):
        return None
    for key in LIST_KEYS:
        if all(name in item for item in items for name in key):
            return key
    return None


def _same_quantity(wanted: Any, live: Any) -> bool:
    """`1000m` and `1` are the same; the API server writes its own form of what it was sent."""
    if live is None or str(wanted) == str(live):
        return str(wanted) == str(live)
    try:
        return Quantity.parse(str(wanted)).value == Quantity.parse(str(live)).value
    except ValueError:
        return False
