"""The custom resource definitions, generated from the pydantic models of the resources.

Owns: the structural schema, names, printer columns, `lanewise crds` and the chart's CRD templates.
Must not: say anything about fields that the models do not say; a rule lives in lanewise/spec*.py, for both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from lanewise.spec import API_VERSION, LLMService
from lanewise.spec_model import Metadata
from lanewise.spec_scaling import ScalingPolicy, ScalingPolicyStatus
from lanewise.spec_status import LLMServiceStatus

Schema = dict[str, Any]
GROUP, VERSION = API_VERSION.split("/")
MAX_TOTAL_BYTES = 100_000
"""All definitions together: Helm keeps a release in a Secret of 1 MB, kubectl an object in an annotation of 256 KB."""

_DROPPED = ("title", "$defs", "additionalProperties", "$ref", "anyOf", "const", "default")
_HELM_HEAD = """\
{{- /* Written by `lanewise crds --write`; a test compares it with lanewise/spec*.py. */}}
{{- if eq (include "lanewise.crd.ours" (dict "root" . "name" "%s")) "true" }}
"""
_HELM_TAIL = "{{- end }}\n"
_HELM_METADATA = '  labels:\n    {{- include "lanewise.labels" . | nindent 4 }}\n'


@dataclass(frozen=True, slots=True)
class Kind:
    """One resource and what `kubectl` shows of it. Columns: (name, JSON path, priority)."""

    model: type[BaseModel]
    status: type[BaseModel]
    plural: str
    short_names: tuple[str, ...]
    columns: tuple[tuple[str, str, int], ...]

    @property
    def name(self) -> str:
        return f"{self.plural}.{GROUP}"


def _condition(kind: str, field: str) -> str:
    return f'.status.conditions[?(@.type=="{kind}")].{field}'


KINDS = (
    Kind(
        LLMService,
        LLMServiceStatus,
        "llmservices",
        ("llm", "llmsvc"),
        (
            ("Ready", _condition("Ready", "status"), 0),
            ("P", ".status.prefill.summary", 0),
            ("D", ".status.decode.summary", 0),
            ("Router", ".status.router.summary", 0),
            ("Reason", _condition("Ready", "reason"), 0),
            ("URL", ".status.url", 0),
            ("Model", ".spec.model.uri", 1),
            ("Version", ".status.runtime.version", 1),
        ),
    ),
    Kind(
        ScalingPolicy,
        ScalingPolicyStatus,
        "scalingpolicies",
        ("llmscale",),
        (
            ("Target", ".spec.targetRef.name", 0),
            ("Active", _condition("Active", "status"), 0),
            ("P-Min", ".spec.prefill.min", 0),
            ("P-Max", ".spec.prefill.max", 0),
            ("D-Min", ".spec.decode.min", 0),
            ("D-Max", ".spec.decode.max", 0),
            ("Reason", _condition("Active", "reason"), 0),
        ),
    ),
)


def definitions() -> list[dict[str, Any]]:
    """The objects as an API server takes them."""
    return [_definition(kind) for kind in KINDS]


def as_yaml(objects: Sequence[Mapping[str, Any]]) -> str:
    return "---\n".join(yaml.safe_dump(dict(item), sort_keys=False, width=120, allow_unicode=True) for item in objects)


def templates() -> dict[str, str]:
    """File name -> text of the chart's CRD templates."""
    return {f"{kind.plural}.yaml": _template(kind) for kind in KINDS}


def structural(model: type[BaseModel]) -> Schema:
    """The JSON schema of a model as a CRD may hold it: no references, no null, no titles, no floats."""
    schema = model.model_json_schema(by_alias=True)
    made = _inlined(schema, schema.get("$defs", {}))
    _refuse_unstructural(made, model.__name__)
    return made


def _definition(kind: Kind) -> dict[str, Any]:
    schema = structural(kind.model)
    name = Metadata.model_json_schema()["properties"]["name"]
    schema["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object", "properties": {"name": {k: name[k] for k in ("type", "maxLength", "pattern")}}},
        "status": structural(kind.status),
    }
    schema["required"] = ["metadata", "spec"]
    columns = [
        {"name": name, "type": "integer" if ".min" in path or ".max" in path else "string", "jsonPath": path}
        | ({"priority": priority} if priority else {})
        for name, path, priority in kind.columns
    ]
    columns.append({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})
    singular = kind.model.__name__.lower()
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": kind.name, "annotations": {"helm.sh/resource-policy": "keep"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.model.__name__,
                "listKind": f"{kind.model.__name__}List",
                "plural": kind.plural,
                "singular": singular,
                "shortNames": list(kind.short_names),
                "categories": ["all", "lanewise"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def _inlined(node: Schema, defs: Mapping[str, Schema]) -> Schema:
    """`node` with references replaced by what they name; words beside a reference win over those at its target."""
    if "$ref" in node:
        target = _inlined(defs[node["$ref"].rpartition("/")[2]], defs)
        return target | _inlined({key: value for key, value in node.items() if key != "$ref"}, defs)
    made: Schema = {}
    options = [option for option in node.get("anyOf", ()) if option != {"type": "null"}]
    if node.get("x-kubernetes-int-or-string"):
        made["anyOf"] = options
    elif len(options) == 1:
        made = _inlined(options[0], defs)
    elif options:
        raise TypeError(f"a union of {len(options)} types is not structural: {node}")
    made |= {key: value for key, value in node.items() if key not in _DROPPED}
    if "const" in node:
        made |= {"type": "string", "enum": [node["const"]]}
    if node.get("default") is not None:
        made["default"] = _without_null(node["default"])
    if isinstance(extra := node.get("additionalProperties"), dict):
        made["additionalProperties"] = _inlined(extra, defs)
    if "properties" in made:
        made["properties"] = {name: _inlined(value, defs) for name, value in made["properties"].items()}
    if isinstance(made.get("items"), dict):
        made["items"] = _inlined(made["items"], defs)
    return made


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return value


def _refuse_unstructural(node: Schema, path: str) -> None:
    for where, schema in walk(node, path):
        if "type" not in schema and not schema.get("x-kubernetes-int-or-string"):
            raise TypeError(f"{where}: no type, expected one")
        if schema.get("type") == "number":
            raise TypeError(f"{where}: a float, expected a string with a grammar or an integer")


def walk(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every schema in a structural schema, with its dotted path; `[]` is a list's item, `*` a map's value."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}" if path else name)
    if isinstance(node.get("items"), dict):
        yield from walk(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from walk(node["additionalProperties"], f"{path}.*")


def _template(kind: Kind) -> str:
    text = as_yaml([_definition(kind)])
    if "{{" in text:
        raise ValueError(f"{kind.name}: {{{{ in a description would be read by Helm")
    head, _, rest = text.partition("spec:\n")
    return _HELM_HEAD % kind.name + head + _HELM_METADATA + "spec:\n" + rest + _HELM_TAIL


def crds(argv: Sequence[str]) -> int:
    """`lanewise crds`: exit 0 done, 1 stale files."""
    parser = argparse.ArgumentParser(
        prog="lanewise crds",
        description="Print the custom resource definitions, ready for `kubectl apply --server-side -f -`.",
        epilog="example:\n  lanewise crds | kubectl apply --server-side -f -",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="a List in JSON instead of YAML documents")
    parser.add_argument("--check", metavar="DIR", help="fail when the chart templates in DIR are stale")
    parser.add_argument("--write", metavar="DIR", help="write the chart templates into DIR")
    options = parser.parse_args(argv)
    if options.write:
        for name, text in templates().items():
            Path(options.write, name).write_text(text, encoding="utf-8")
    elif options.check:
        stale = _stale(Path(options.check))
        if stale:
            names = ", ".join(stale)
            print(f"{options.check}: stale: {names}; run `lanewise crds --write {options.check}`", file=sys.stderr)
            return 1
    elif options.json:
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": definitions()}, indent=1))
    else:
        print(as_yaml(definitions()), end="")
    return 0


def _stale(folder: Path) -> list[str]:
    wanted = templates()
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml"))}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
