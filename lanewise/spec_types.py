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
    accepts_int: ClassVar[bool] = False

    @classmethod
    def parse(cls, value: object) -> Self:
        if cls.accepts_int and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            value = str(value)
        if not isinstance(value, str) or len(value) > 32 or not re.fullmatch(cls.pattern, value):
            raise PydanticCustomError(
                "written", "expected {what}, got {got}", {"what": cls.expected, "got": shown(value)}
            )
        return cls(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls._dump)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if cls.accepts_int:
            # The Kubernetes idiom for "16 or 16Gi": structural, and understood by kubectl.
            both = [{"type": "integer"}, {"type": "string"}]
            return {"anyOf": both, "pattern": f"^{cls.pattern}$", "x-kubernetes-int-or-string": True}
        return {"type": "string", "pattern": f"^{cls.pattern}$", "maxLength": 32}

    def _dump(self) -> str | int:
        return int(self) if self.accepts_int and self.isdigit() else str(self)


class Duration(_Written):
    """`400ms`, `30s`, `10m`, `1h30m`. Never a bare number: 60 of what?"""

    pattern = r"([0-9]{1,9}(ms|s|m|h))+"
    expected = "a duration such as 400ms, 30s, 10m or 1h"

    @property
    def seconds(self) -> float:
        return float(sum(int(n) * _UNIT_S[unit] for n, unit in re.findall(r"([0-9]+)(ms|s|m|h)", self)))


class Quantity(_Written):
    """A Kubernetes quantity: `16Gi`, `500m`, `2`."""

    pattern = r"[0-9]{1,18}(\.[0-9]{1,9})?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?"
    expected = "a quantity such as 2, 500m or 16Gi (quote a fraction)"
    accepts_int = True

    @property
    def value(self) -> Decimal:
        number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", self).groups()  # type: ignore[union-attr]  # parse() matched
        return Decimal(number) * _QUANTITY_SCALE[unit]


class IntOrPercent(_Written):
    """A number of pods, or a share of them such as `25%`."""

    pattern = r"([0-9]{1,4}|[0-9]{1,2}%|100%)"
    expected = "a count such as 1 or a percentage such as 25%"
    accepts_int = True

    @property
    def is_zero(self) -> bool:
        return int(self.rstrip("%")) == 0


LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
SECRET_KEY = r"^[-._a-zA-Z0-9]+$"
SERVED_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
MODEL_URI = (
    r"^(hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^\s]*)?"
    r"|file:///[^\s]+|builtin://[a-z0-9-]+)$"
)
REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
CRON = r"^[0-9*,/-]+( +[0-9A-Za-z*,/-]+){4}$"

PATTERN_WORDS = {
    LABEL: "lower-case letters, digits and '-', such as chat",
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
