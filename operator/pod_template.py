"""Merging a user's podTemplate into a pod of ours.

Owns: the table of lists that merge by key. Every other list is replaced, every mapping is merged field by field, and
null removes what we set. Must not: validate what the user wrote; the API server does that on a dry run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lanewise.errors import ConfigError

KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "ports": ("containerPort", "protocol"),
    "imagePullSecrets": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "hostAliases": ("ip",),
}
"""List -> the fields that name one of its elements, as in the Kubernetes API."""
DEFAULTS = {"protocol": "TCP"}
APPENDED = frozenset({"tolerations", "envFrom", "resourceClaims"})
"""Lists without a key where a user adds to ours."""
ONE_OF = (frozenset({"value", "valueFrom"}),)
"""Fields that exclude one another: setting one drops the other."""
_VOLUME_COMMON = frozenset({"name"})


def merge_template(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A pod template (metadata and spec); inputs stay as they were. ConfigError names the path that has no meaning."""
    return _merge(dict(ours), theirs, "podTemplate") if theirs else dict(ours)


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = {name: value for name, value in ours.items() if not _displaced(name, theirs)}
    for name, value in theirs.items():
        here = f"{path}.{name}"
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merge(merged[name], value, here)
        elif isinstance(value, list) and isinstance(merged.get(name), list):
            merged[name] = _merge_list(name, merged[name], value, here)
        elif isinstance(value, list) != isinstance(merged.get(name, value), list):
            raise ConfigError(f"{here}: expected {'a list' if isinstance(merged[name], list) else 'a mapping'}")
        else:
            merged[name] = value
    return merged


def _displaced(name: str, theirs: Mapping[str, Any]) -> bool:
    return any(name in group and not group.isdisjoint(set(theirs) - {name}) for group in ONE_OF)


def _merge_list(name: str, ours: Sequence[Any], theirs: Sequence[Any], path: str) -> list[Any]:
    if name in APPENDED:
        return [*ours, *(item for item in theirs if item not in ours)]
    if name not in KEYS:
        return list(theirs)
    merged = {_key(name, item, path): item for item in ours}
    for index, item in enumerate(theirs):
        here = f"{path}[{index}]"
        key = _key(name, item, here)
        known = merged.get(key)
        if known is None:
            merged[key] = item
        elif name == "volumes" and set(item) - _VOLUME_COMMON:
            merged[key] = item  # a volume has one source: another kind of source replaces ours
        else:
            merged[key] = _merge(known, item, here)
    return list(merged.values())


def _key(name: str, item: object, path: str) -> tuple[Any, ...]:
    if not isinstance(item, Mapping):
        raise ConfigError(f"{path}: expected a mapping")
    missing = [field for field in KEYS[name] if field not in item and field not in DEFAULTS]
    if missing:
        raise ConfigError(f"{path}.{missing[0]}: required, it says which of {name} is meant")
    return tuple(item.get(field, DEFAULTS.get(field)) for field in KEYS[name])
