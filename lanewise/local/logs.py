"""The one merged log of a local service, for a terminal or as JSON lines.

Owns: how a child's line and the supervisor's own words look.
Must not: decide what is said or when.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Literal, TextIO

_HIDDEN = ("event", "level", "timestamp", "logger", "role", "pid", "process", "name")
_COLOURS = (36, 32, 35, 34, 33)
_LEVEL_COLOUR = {"warning": 33, "error": 31, "critical": 31}


class Log:
    """Writes whole lines and flushes each: the reader may be a pipe."""

    def __init__(self, stream: TextIO, form: Literal["text", "json"]) -> None:
        self._stream = stream
        self._form = form
        self._colour = form == "text" and stream.isatty()
        self.on_lost: Callable[[], None] | None = None  # called once when the reader has gone
        self._names: dict[str, int] = {}
        self._width = 0

    def announce(self, names: list[str]) -> None:
        """The processes to come, so that their names line up."""
        self._names = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
        self._width = max(map(len, names), default=0)

    def say(self, text: str, **fields: object) -> None:
        """The supervisor's own words: `text` for people; with `fields`, the same as a record."""
        if self._form == "text":
            self._write(text)
        else:
            self._write(json.dumps({"process": "supervisor", "timestamp": _now_iso(), "event": text, **fields}))

    def child(self, name: str, stream: str, line: str, record: dict[str, Any] | None) -> None:
        """One line of a child."""
        if self._form == "json":
            body = record if record is not None else {"event": line, "stream": stream}
            self._write(json.dumps({"process": name, **body}))
        elif record is None:
            self._write(f"{self._tag(name)} {line}")
        elif record.get("event") not in ("ready", "routable"):  # the supervisor words those itself
            self._write(f"{self._tag(name)} {self._readable(record)}")

    def _tag(self, name: str) -> str:
        padded = f"{name:<{self._width}} |"
        return self._paint(padded, self._names.get(name, 37))

    def _readable(self, record: dict[str, Any]) -> str:
        level = str(record.get("level", "info"))
        rest = " ".join(f"{key}={_value(value)}" for key, value in record.items() if key not in _HIDDEN)
        text = f"{record.get('event', '')} {rest}".rstrip()
        shown = text if level == "info" else f"{self._paint(level, _LEVEL_COLOUR.get(level, 37))}: {text}"
        return f"{_clock(record.get('timestamp'))} {shown}"

    def _paint(self, text: str, colour: int) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except OSError:  # a closed pipe or terminal: in a callback of the event loop nobody would hear of it
            lost, self.on_lost = self.on_lost, None
            if lost is not None:
                lost()


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return json.dumps(text) if isinstance(value, str) and (" " in text or not text) else text


def _clock(timestamp: object) -> str:
    """HH:MM:SS of an ISO timestamp, else of now."""
    if isinstance(timestamp, str) and len(timestamp) >= 19 and timestamp[10] in "T ":
        return timestamp[11:19]
    return time.strftime("%H:%M:%S")


def _now_iso() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def size(num_bytes: int) -> str:
    """`113 MB`, `1.2 GB`."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
