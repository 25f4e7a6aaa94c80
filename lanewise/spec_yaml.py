"""Reading LLMService resources from YAML, with errors a person can act on.

Owns: `FILE:LINE: field: expected ..., got ...` for every problem of a file at once.
Must not: hold rules about the fields themselves (spec.py does), know commands or clusters.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lanewise.errors import ConfigError
from lanewise.spec import API_VERSION, LLMService
from lanewise.spec_model import Model
from lanewise.spec_scaling import ScalingPolicy
from lanewise.spec_types import PATTERN_WORDS, shown

KINDS: dict[str, type[Model]] = {"LLMService": LLMService, "ScalingPolicy": ScalingPolicy}
Loc = tuple[str | int, ...]

_TYPE_WORDS = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "list_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_long": "at most {max_length} entries",
    "string_too_long": "at most {max_length} characters",
}


@dataclass(frozen=True, slots=True)
class SpecProblem:
    """One thing wrong with a file. `field` is empty where the file as a whole is meant."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: "
        return where + (f"{self.field}: {self.message}" if self.field else self.message)


class SpecError(ConfigError):
    """Everything wrong with one file."""

    def __init__(self, problems: list[SpecProblem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line)
        super().__init__("\n".join(map(str, self.problems)))


def read_service(file: str | Path) -> LLMService:
    """The one LLMService of a file; other documents in it are checked where they are ours, else passed over."""
    found = [resource for resource in read_resources(file) if isinstance(resource, LLMService)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(service.metadata.name for service in found)
    message = (
        f"expected one LLMService, got {len(found)}: {names}" if found else "expected a document of kind LLMService"
    )
    raise SpecError([SpecProblem(str(file), 1, "", message)])


def read_resources(file: str | Path) -> list[LLMService | ScalingPolicy]:
    """All our resources of a YAML or JSON file, or `SpecError` with every problem in it."""
    name = str(file)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {name}: not UTF-8 text (byte {error.start})") from error
    return parse_resources(text, name)


def parse_resources(text: str, name: str = "<text>") -> list[LLMService | ScalingPolicy]:
    problems: list[SpecProblem] = []
    resources: list[LLMService | ScalingPolicy] = []
    try:
        for node, data in _documents(text):
            problems += [SpecProblem(name, line, field, what) for line, field, what in _duplicate_keys(node)]
            model, errors = _validate(data)
            problems += [
                SpecProblem(name, _line(node, loc), _dotted(loc), what) for loc, what in errors
            ]  # fmt: skip
            if isinstance(model, (LLMService, ScalingPolicy)):
                resources.append(model)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(SpecProblem(name, mark.line + 1 if mark else 1, "", f"not valid YAML: {error.problem}"))
    except yaml.YAMLError as error:
        problems.append(SpecProblem(name, 1, "", f"not valid YAML: {error}".splitlines()[0]))
    if problems:
        raise SpecError(problems)
    return resources


def _documents(text: str) -> Iterator[tuple[yaml.Node, object]]:
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                return
            yield node, loader.construct_document(node)
    finally:
        loader.dispose()


def _validate(data: object) -> tuple[Model | None, list[tuple[Loc, str]]]:
    if data is None:
        return None, []
    if not isinstance(data, dict):
        return None, [((), f"expected a mapping with apiVersion, kind, metadata and spec, got {shown(data)}")]
    kind, version = data.get("kind"), data.get("apiVersion")
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        if isinstance(version, str) and not version.startswith("lanewise.io/") and isinstance(kind, str):
            return None, []  # somebody else's document, such as a Secret
        near = "LLMService" if kind is None else _one_of(KINDS)
        return None, [(("kind",), f"expected {near}, got {shown(kind)}")]
    if isinstance(version, str) and version != API_VERSION:
        return None, [(("apiVersion",), f"expected {API_VERSION}, got {shown(version)}")]
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        return None, [found for detail in error.errors() for found in _in_words(model, dict(detail))]


def _in_words(model: type[Model], detail: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """One pydantic error as (place, words)."""
    loc: Loc = detail["loc"]
    kind, ctx, got = detail["type"], detail.get("ctx", {}), shown(detail["input"])
    if kind == "rules":
        for field, what in ctx["problems"]:
            yield loc + _split(field), what
    elif kind == "missing":
        yield loc, "required field is missing"
    elif kind == "extra_forbidden":
        yield loc, _unknown(_fields_at(model, loc[:-1]), str(loc[-1]))
    elif kind == "literal_error":
        yield loc, f"expected {ctx['expected']}, got {got}".replace("'", "")
    elif kind == "string_pattern_mismatch":
        yield loc, f"expected {PATTERN_WORDS.get(ctx['pattern'], 'to match ' + ctx['pattern'])}, got {got}"
    elif kind == "written":
        yield loc, detail["msg"]
    elif kind == "invalid_key" or loc[-1:] == ("[key]",):
        yield loc[:-1], f"expected names as keys, got {got}"
    elif kind in _TYPE_WORDS:
        hint = (
            " (quote it)" if kind == "string_type" and not isinstance(detail["input"], (dict, list, type(None))) else ""
        )
        yield loc, f"expected {_TYPE_WORDS[kind].format(**ctx)}, got {_size(kind, ctx) or got}{hint}"
    else:
        yield loc, f"{detail['msg']}, got {got}"


def _size(kind: str, ctx: Mapping[str, Any]) -> str:
    return str(ctx["actual_length"]) if kind == "too_long" else ""


def _unknown(fields: list[str], name: str) -> str:
    near = difflib.get_close_matches(name, fields, 1, 0.6)
    if near:
        return f"unknown field, did you mean {near[0]}?"
    return f"unknown field, expected {_one_of(fields)}" if fields else "unknown field"


def _fields_at(model: type[BaseModel], loc: Loc) -> list[str]:
    """Names of the fields that the object at `loc` has."""
    for part in loc:
        if isinstance(part, int):
            continue  # a list adds an index; the item's model was found with the field
        for field in model.model_fields.values():
            if field.alias == part:
                model = _model_in(field.annotation) or model
                break
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg)) is not None), None)


def _one_of(names: Mapping[str, object] | list[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:-1]) + (" or " if len(listed) > 1 else "") + listed[-1]


def _split(field: tuple[str | int, ...] | str) -> Loc:
    if isinstance(field, tuple):
        return field
    return tuple(int(part) if part.isdigit() else part for part in field.split(".") if part)


def _dotted(loc: Loc) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _line(node: yaml.Node, loc: Loc) -> int:
    """Line of the deepest part of `loc` that is written in the file (from 1)."""
    line = node.start_mark.line
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in reversed(node.value) if k.value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return int(line) + 1


def _duplicate_keys(node: yaml.Node, loc: Loc = ()) -> Iterator[tuple[int, str, str]]:
    """YAML itself lets the last of two equal keys win in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in seen:
                    yield line, _dotted((*loc, key.value)), f"written twice, first on line {seen[key.value]}"
                seen.setdefault(key.value, line)
                if value.start_mark.line >= key.start_mark.line:  # an alias points back to what was checked already
                    yield from _duplicate_keys(value, (*loc, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicate_keys(item, (*loc, index))
