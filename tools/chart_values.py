"""Writes the table of chart values into docs/chart.md, from the comments of values.yaml (`# -- text` above a value).

Run it after a change of deploy/helm/lanewise/values.yaml: `python tools/chart_values.py`. A test fails when it was not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
VALUES = ROOT / "deploy" / "helm" / "lanewise" / "values.yaml"
PAGE = ROOT / "docs" / "chart.md"
BEGIN, END = "<!-- values: made by tools/chart_values.py -->\n", "<!-- end of values -->"
_KEY = re.compile(r"^( *)([A-Za-z]+):")


def described(text: str) -> Iterator[tuple[str, str]]:
    """(path, description) of each value that has a comment; a value without one is described by those below it."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.strip().startswith("# -- "):
            comment = [line.strip().removeprefix("# -- ")]
        elif comment and line.strip().startswith("# "):
            comment.append(line.strip().removeprefix("# "))
        elif found := _KEY.match(line):
            indent = len(found[1])
            path = [(depth, key) for depth, key in path if depth < indent] + [(indent, found[2])]
            if comment:
                yield ".".join(key for _, key in path), " ".join(comment)
            comment = []


def table() -> str:
    text = VALUES.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    rows = [f"| `{path}` | {_default(values, path)} | {what} |" for path, what in described(text)]
    return "\n".join(("| value | default | what it does |", "|---|---|---|", *rows)) + "\n"


def page(old: str) -> str:
    """The page with the table put in."""
    head, rest = old.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


def _default(values: Any, path: str) -> str:
    for key in path.split("."):
        values = values[key]
    return f"`{json.dumps(values)}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
