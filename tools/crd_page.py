"""Writes the field tables of docs/crds.md from the definitions that the chart installs.

Run it after a change of lanewise/spec*.py: `python tools/crd_page.py`. A test fails when it was not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lanewise.operator.crd import definitions

PAGE = Path(__file__).parent.parent / "docs" / "crds.md"
BEGIN, END = "<!-- fields of {}: made by tools/crd_page.py -->\n", "<!-- end of fields -->"
SHOWN = 60


def tables() -> dict[str, str]:
    """Kind -> table of its spec."""
    found = {}
    for definition in definitions():
        schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        rows = [f"| `{path}` | {what} | {text} |" for path, what, text in fields(schema)]
        head = ("| field | value | what it is |", "|---|---|---|")
        found[definition["spec"]["names"]["kind"]] = "\n".join((*head, *rows)) + "\n"
    return found


def fields(schema: dict[str, Any], path: str = "spec") -> Iterator[tuple[str, str, str]]:
    """(path, what may stand there, description) of every field, and a row for each rule between fields."""
    for name, node in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        yield f"{path}.{name}", _value(node, required), node.get("description", "")
        inner = node.get("items", node)
        yield from fields(inner, f"{path}.{name}" + ("[]" if "items" in node else ""))
    for entry in schema.get("x-kubernetes-validations", ()):
        at = entry.get("fieldPath", "")
        changed = " (on update)" if "oldSelf" in entry["rule"] else ""
        yield f"{path}{at}", f"rule{changed}", entry["message"]


def _value(node: dict[str, Any], required: bool) -> str:
    parts = []
    if "enum" in node:
        parts.append(", ".join(f"`{value}`" for value in node["enum"]))
    elif node.get("x-kubernetes-int-or-string"):
        parts.append("number or text")
    else:
        parts.append({"array": "list", "object": "object"}.get(node["type"], node["type"]))
    if "minimum" in node and not node.get("x-kubernetes-int-or-string"):
        parts.append(f"{node['minimum']} to {node['maximum']}")
    if "maxItems" in node:
        parts.append(f"at most {node['maxItems']}")
    if required:
        parts.append("required")
    default = node.get("default")
    if default is not None and node["type" if "type" in node else "default"] != "object":
        parts.append(f"default `{default}`".replace("False", "false").replace("True", "true"))
    return "; ".join(parts)


def page(old: str) -> str:
    """The page with the tables put in."""
    for kind, table in tables().items():
        begin = BEGIN.format(kind)
        head, rest = old.split(begin)
        _, _, tail = rest.partition(END)
        old = head + begin + table + END + tail
    return old


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
