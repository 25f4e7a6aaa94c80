"""What every object of a Lanewise resource is: a strict model with declared rules between its fields.

Owns: the base class, the rule classes (each rule is said once for Python and once for the API server, with one
message), metadata. Must not: know a resource or its fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError

from lanewise.spec_types import ServiceName

Problem = tuple[tuple[str | int, ...] | str, str]
"""A field of the model at hand (dotted, or its parts where a part has dots itself) and what is wrong with it."""
Reason = Literal["FieldValueInvalid", "FieldValueRequired", "FieldValueForbidden"]

_VALUE = re.compile(r"\{self\.([a-z_.]+)\}")


def _cel_text(text: str) -> str:
    """A string literal of CEL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule between fields of one object.

    `field` is a dotted path in camelCase ("" is the object itself, a last part with dots is quoted with []), `message`
    may hold `{self.field}`, `cel` is true where `holds` is.
    """

    field: str
    message: str
    cel: str
    holds: Callable[[Any], bool]
    reason: Reason = "FieldValueInvalid"

    def problems(self, found: Any) -> Iterable[Problem]:
        if not self.holds(found):
            yield _parts(self.field), self.message.format(self=found)

    def validation(self) -> dict[str, str]:
        """The entry of `x-kubernetes-validations`."""
        return _validation(self.cel, self.message, self.field, self.reason)


@dataclass(frozen=True, slots=True)
class EachRule:
    """A rule for every entry of a map or list: `culprits` gives the places under `field` where it is broken.

    `cel` is empty where the schema itself says it (two entries with one key in a list of type map).
    """

    field: str
    message: str
    cel: str
    culprits: Callable[[Any], Iterable[tuple[str | int, ...]]]

    def problems(self, found: Any) -> Iterable[Problem]:
        for place in self.culprits(found):
            yield (*_parts(self.field), *place), self.message.format(self=found)

    def validation(self) -> dict[str, str]:
        return _validation(self.cel, self.message, self.field, "FieldValueInvalid")


@dataclass(frozen=True, slots=True)
class Transition:
    """What may not change: only the API server sees both objects, so there is nothing to check in one file."""

    field: str
    message: str
    cel: str

    def problems(self, found: Any) -> Iterable[Problem]:
        return ()

    def validation(self) -> dict[str, str]:
        return _validation(self.cel, self.message, self.field, "FieldValueForbidden")


AnyRule = Rule | EachRule | Transition


def _parts(field: str) -> tuple[str, ...]:
    """`a.b[c.d]` as ("a", "b", "c.d")."""
    path, _, quoted = field.partition("[")
    return (*(part for part in path.split(".") if part), *((quoted[:-1],) if quoted else ()))


def _validation(cel: str, message: str, field: str, reason: Reason) -> dict[str, str]:
    """Values in the message are read by the API server too; `message` stays for a value that is not there."""
    entry = {"rule": cel}
    values = [".".join(map(to_camel, value.split("."))) for value in _VALUE.findall(message)]
    if values:
        text = _VALUE.sub("%s", message.replace("%", "%%"))
        entry["messageExpression"] = f"{_cel_text(text)}.format([{', '.join(f'self.{value}' for value in values)}])"
    entry["message"] = _VALUE.sub("…", message)
    if field:
        path, _, quoted = field.partition("[")
        entry["fieldPath"] = f".{path}" + (f"['{quoted[:-1]}']" if quoted else "")
    if reason != "FieldValueInvalid":
        entry["reason"] = reason
    return entry


class Model(BaseModel):
    """Base of every object: unknown fields and silent conversions are errors; rules are listed, not raised singly."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, alias_generator=to_camel)
    rules: ClassVar[tuple[AnyRule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> Model:
        found = [problem for rule in self.rules for problem in rule.problems(self)]
        if found:
            text = "; ".join(f"{'.'.join(map(str, parts))}: {what}" for parts, what in found)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": found})
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        made = handler(schema)
        if entries := [rule.validation() for rule in cls.rules if rule.cel]:
            handler.resolve_ref_schema(made)["x-kubernetes-validations"] = entries
        return made


class Metadata(BaseModel):
    """Kubernetes' own object; only the name has rules of ours (it is a prefix of pod and Service names)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: ServiceName
    namespace: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
