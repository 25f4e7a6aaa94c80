"""The scalar types of the LLMService resources: durations, quantities, counts or percentages, names.

Owns: how each is written, its value in base units, its structural JSON schema and the words used when it is wrong.
Must not: know any resource. Every type stays a plain string (or integer) in a dump, so a file survives a round trip.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_UNIT_S = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_QUANTITY_SCALE = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** (i + 1) for i, unit in enumerate("kMGTPE")},
    **{unit: Decimal(1024) ** (i + 1) for i, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
}


def cel_quantity(value: str) -> str:
    """CEL of a quantity that may be written as a number; `string()` of one has no bound in the API server's costs."""
    return f"(type({value}) == int ? quantity('0').add({value}) : quantity({value}))"


MAX_WRITTEN = 32
"""Characters of a duration, quantity or percentage."""


def shown(value: object) -> str:
    """A value as a person typed it, short enough for one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Written(str):
    """A string with a grammar. Subclasses say which and what to expect."""

    pattern: ClassVar[str]
    expected: ClassVar[str]
    max_int: ClassVar[int | None] = None
    """Where whole numbers may be written without quotes: the largest."""
    rule: ClassVar[tuple[str, str] | None] = None
    """What the grammar cannot say: (CEL, message); `sound` says the same in Python."""

    is_number = False
    """Written without quotes; it leaves as it came."""

    @property
    def sound(self) -> bool:
        return True

    @classmethod
    def parse(cls, value: object) -> Self:
        written = value
        if cls.max_int is not None and isinstance(value, int) and not isinstance(value, bool):
            written = str(value) if 0 <= value <= cls.max_int else None
        if not isinstance(written, str) or len(written) > MAX_WRITTEN or not re.fullmatch(cls.pattern, written):
            raise PydanticCustomError(
                "written", "expected {what}, got {got}", {"what": cls.expected, "got": shown(value)}
            )
        found = cls(written)
        found.is_number = not isinstance(value, str)
        if cls.rule is not None and not found.sound:
            raise PydanticCustomError("written", "{what}, got {got}", {"what": cls.rule[1], "got": shown(value)})
        return found

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls._dump)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        made: dict[str, Any] = {"pattern": f"^{cls.pattern}$", "maxLength": MAX_WRITTEN}
        if cls.max_int is not None:
            # The Kubernetes idiom for "16 or 16Gi": structural, and understood by kubectl.
            made |= {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
            made |= {"minimum": 0, "maximum": cls.max_int}
        else:
            made["type"] = "string"
        if cls.rule is not None:
            made["x-kubernetes-validations"] = [{"rule": cls.rule[0], "message": cls.rule[1]}]
        return made

    def _dump(self) -> str | int:
        return int(self) if self.is_number else str(self)


class Duration(_Written):
    """`400ms`, `30s`, `10m`, `1h30m`. Never a bare number: 60 of what?"""

    # At most 4.6 years in all: the API server counts durations in nanoseconds of 64 bits.
    pattern = r"([0-9]{1,9}ms|[0-9]{1,7}s|[0-9]{1,5}m|[0-9]{1,4}h){1,4}"
    expected = "a duration such as 400ms, 30s, 10m or 1h"

    @property
    def seconds(self) -> float:
        return float(sum(int(n) * _UNIT_S[unit] for n, unit in re.findall(r"([0-9]+)(ms|s|m|h)", self)))


class PositiveDuration(Duration):
    rule = ("duration(self) > duration('0s')", "expected a duration above zero")

    @property
    def sound(self) -> bool:
        return self.seconds > 0


class Quantity(_Written):
    """A Kubernetes quantity: `16Gi`, `500m`, `2`."""

    pattern = r"[0-9]{1,18}(\.[0-9]{1,9})?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?"
    expected = "a quantity such as 2, 500m or 16Gi (quote a fraction)"
    max_int = 10**15  # exact in the float64 that bounds of a schema are

    @property
    def value(self) -> Decimal:
        number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", self).groups()  # type: ignore[union-attr]  # parse() matched
        return Decimal(number) * _QUANTITY_SCALE[unit]


class PositiveQuantity(Quantity):
    rule = (f"{cel_quantity('self')}.isGreaterThan(quantity('0'))", "expected more than 0")

    @property
    def sound(self) -> bool:
        return self.value > 0


class IntOrPercent(_Written):
    """A number of pods, or a share of them such as `25%`."""

    pattern = r"(0|[1-9][0-9]{0,3}|(0|[1-9][0-9]?|100)%)"
    expected = "a count such as 1 or a percentage such as 25%"
    max_int = 9999

    @property
    def is_zero(self) -> bool:
        return int(self.rstrip("%")) == 0


LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
SECRET_KEY = r"^[-._a-zA-Z0-9]+$"
SERVED_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
MODEL_URI = (
    r"^(hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[!-~]*)?"
    r"|file:///[!-~]+|builtin://[a-z0-9-]+)$"
)
REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
CRON = r"^[0-9*,/-]+( +[0-9A-Za-z*,/-]+){4}$"

PATTERN_WORDS = {
    LABEL: "lower-case letters, digits and '-', a letter first, such as chat",
    SUBDOMAIN: "an object name: lower-case letters, digits, '-' and '.'",
    SECRET_KEY: "a key of the Secret: letters, digits, '-', '_' and '.'",
    SERVED_NAME: "a model name such as qwen or Qwen/Qwen2.5-7B",
    MODEL_URI: "hf://owner/name, pvc://claim/dir, file:///dir or builtin://fable",
    REVISION: "a branch, tag or commit",
    CRON: 'five cron fields such as "0 8 * * 1-5"',
}
"""What to expect, by pattern, for error messages."""

ObjectName = Annotated[str, Field(pattern=SUBDOMAIN, max_length=253)]
ServiceName = Annotated[str, Field(pattern=LABEL, max_length=40)]
