"""Every rule of the resources by name, read from the pydantic models, and the two tables of resources.

Owns: what counts as a rule (a constraint of a field, of a scalar type, or between fields), reading the tables.
Must not: know the CRDs; they are held against this.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lanewise.spec import LLMService
from lanewise.spec_model import Model
from lanewise.spec_scaling import ScalingPolicy
from lanewise.spec_types import LABEL, SUBDOMAIN, Duration, IntOrPercent, PositiveDuration, PositiveQuantity, Quantity

RESOURCES = Path(__file__).parent / "resources"
ROOTS: tuple[type[Model], ...] = (LLMService, ScalingPolicy)
SHARED_PATTERNS = {SUBDOMAIN: "ObjectName", LABEL: "ServiceName"}
WRITTEN = (Duration, PositiveDuration, Quantity, PositiveQuantity, IntOrPercent)
TYPES = ("string", "integer", "boolean", "object", "array")
OF_EVERY_OBJECT = frozenset({"unknown field", "duplicate field", "no floats", *(f"type {name}" for name in TYPES)})
SET_BY_THE_API_SERVER = frozenset({"api_version", "kind", "metadata", "status"})

Constraint = tuple[str, object]
"""JSON schema keyword and its value."""


def models(root: type[BaseModel]) -> dict[type[BaseModel], None]:
    """The classes a resource is made of, each once."""
    found: dict[type[BaseModel], None] = {}
    todo = [root]
    while todo:
        model = todo.pop()
        if model not in found:
            found[model] = None
            todo += [inner for field in model.model_fields.values() for inner in models_in(field.annotation)]
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Classes of objects that a field's annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def constraints(field: FieldInfo) -> list[Constraint]:
    """What pydantic holds a field to, in the words of JSON schema, wherever in the annotation it stands."""
    found = [*_of_metadata(field.metadata, field.annotation)]
    found += _of_annotation(field.annotation)
    return ([("required", True)] if field.is_required() else []) + list(dict.fromkeys(found))


def _of_annotation(annotation: Any) -> list[Constraint]:
    if get_origin(annotation) is Literal:
        return [("enum", get_args(annotation))]
    found: list[Constraint] = []
    if get_origin(annotation) is Annotated:
        for extra in annotation.__metadata__:
            metadata = extra.metadata if isinstance(extra, FieldInfo) else [extra]
            found += _of_metadata(metadata, annotation.__origin__)
    for part in get_args(annotation):
        if not isinstance(part, FieldInfo):
            found += _of_annotation(part)
    return found


def _of_metadata(metadata: list[Any], annotation: Any) -> Iterator[Constraint]:
    container = get_origin(annotation)
    longest = {list: "maxItems", dict: "maxProperties"}.get(container or str, "maxLength")
    for item in metadata:
        if isinstance(item, annotated_types.Ge):
            yield "minimum", item.ge
        elif isinstance(item, annotated_types.Le):
            yield "maximum", item.le
        elif isinstance(item, annotated_types.MaxLen):
            yield longest, item.max_length
        elif getattr(item, "pattern", None) is not None:
            yield "pattern", item.pattern
        else:
            raise TypeError(f"a constraint that this enumeration does not know: {item!r}")


def all_rules() -> set[str]:
    """The name of every rule of both resources."""
    found = set(OF_EVERY_OBJECT)
    for root in ROOTS:
        for model in models(root):
            found |= {name for name, field in _fields(model) for name in _rules_of(model, name, field)}
            for cls in model.__mro__:
                found |= {rule_name(cls, rule) for rule in vars(cls).get("rules", ())}
    for written in WRITTEN:
        found |= set(_rules_of_scalar(written))
    return found


def rule_name(model: type, rule: Any) -> str:
    """`Class: field first words of the message`; the tables may shorten it."""
    return f"{model.__name__}: {rule.field} {rule.message}".replace(":  ", ": ")


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if not (model in ROOTS and name in SET_BY_THE_API_SERVER) and model.__name__ != "Metadata":
            yield name, field


def _rules_of(model: type[BaseModel], name: str, field: FieldInfo) -> Iterator[str]:
    home = next(cls for cls in reversed(model.__mro__) if name in vars(cls).get("__annotations__", {}))
    if "_Range" in home.__name__:
        home = model  # only named there; bounds are each role's own
    found = dict(constraints(field))
    shared = SHARED_PATTERNS.get(str(found.get("pattern")))
    for keyword in found:
        owner = shared if shared and keyword in ("pattern", "maxLength") else f"{home.__name__}.{field.alias or name}"
        yield f"{owner} {keyword}"


def _rules_of_scalar(written: Any) -> Iterator[str]:
    if "pattern" in vars(written):
        yield f"{written.__name__} pattern"
        if written is Duration:
            yield "Duration maxLength"  # the others cannot get so long by their patterns
        if written.max_int is not None:
            yield from (f"{written.__name__} {keyword}" for keyword in ("minimum", "maximum"))
    if "rule" in vars(written) and written.rule:
        yield f"{written.__name__} rule"


# ---------------------------------------------------------------- tables

SOUND: dict[str, dict[str, Any]] = {
    "LLMService": {"model": {"uri": "hf://owner/name"}},
    "ScalingPolicy": {"targetRef": {"name": "chat"}, "prefill": {"max": 8}, "decode": {"max": 8}},
}


@dataclass(frozen=True)
class Invalid:
    """A row of invalid.yaml. `old` is None unless the rule is about a change."""

    rule: str
    kind: str
    field: str
    message: str
    body: dict[str, Any]
    old: dict[str, Any] | None = None
    text: str = ""
    """Spliced into the spec's JSON, for what cannot be an object."""
    also: str = ""
    """Another field that the API server cannot but name."""


def invalid() -> list[Invalid]:
    rows = yaml.safe_load((RESOURCES / "invalid.yaml").read_text())
    return [_row(row) for row in rows]


def valid() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RESOURCES / "valid.yaml").read_text()))


def resource(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "lanewise.io/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _row(row: Mapping[str, Any]) -> Invalid:
    kind, name = row.get("kind", "LLMService"), row.get("name", "case")
    body = resource(kind, name, _laid_over(SOUND[kind], _spelled_out(row.get("spec", {}))))
    if "without" in row:
        *path, last = row["without"].split(".")
        place = body
        for part in path:
            place = place[part]
        del place[last]
    old = resource(kind, name, _laid_over(SOUND[kind], row["old"])) if "old" in row else None
    return Invalid(row["rule"], kind, row["field"], row["message"], body, old, row.get("text", ""), row.get("also", ""))


def _laid_over(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(base)
    for key, value in patch.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _laid_over(found[key], value) if both else value
    return found


def _spelled_out(value: Any) -> Any:
    """The tables say `LONG 129` for 129 characters, and so on."""
    if isinstance(value, dict):
        return {key: _spelled_out(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelled_out(item) for item in value]
    word, _, number = value.rpartition(" ") if isinstance(value, str) else ("", "", "")
    if not number.isdigit() or not word.rpartition("/")[2].isupper():
        return value
    count = int(number)
    made: dict[str, Any] = {
        "LONG": "x" * count,
        "DIGITS": ("0 8 * * " + "1" * count)[:count],
        "LONGKEY": {"x" * count: 1},
        "NAMES": [{"name": f"s{index}"} for index in range(count)],
        "KEYS": {f"example.com/r{index}": 1 for index in range(count)},
        "TEXTS": {f"example.com/a{index}": "" for index in range(count)},
        "SCHEDULES": [{"cron": "0 8 * * *", "duration": "1h", "prefill": {"min": 1}} for _ in range(count)],
    }
    prefix, slash, kind = word.rpartition("/")
    return f"{prefix}{slash}{made[kind]}" if slash else made[word]
