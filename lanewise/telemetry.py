"""Logs and metrics of every process.

Owns: the one logging set-up (one JSON object per line, or readable text), the context that puts `request_id` and
`epoch` on every line, and the shared shapes of Prometheus metrics.
Must not: decide what is worth logging, hold metrics of a component, or import anything heavy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, Literal, TextIO

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lanewise.tallies import Spread, Tally

LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    *(1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


def _encode(event: dict[str, Any], **_: Any) -> str:
    # msgspec is several times faster than json, and an access log line is written per request.
    return msgspec.json.encode(event, enc_hook=str).decode()


def _processors(log_format: Literal["json", "text"]) -> list[structlog.typing.Processor]:
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer(serializer=_encode)
        return [*shared, structlog.processors.format_exc_info, renderer]
    return [*shared, structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())]


class _Foreign(logging.Handler):
    """Lines of libraries that use the standard logging module, in the same form as ours."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, Any] = {"logger": record.name}
            if record.exc_info:
                fields["exc_info"] = record.exc_info
            level = record.levelname.lower()
            log = structlog.get_logger(record.name)
            getattr(log, level if level in ("debug", "warning", "error", "critical") else "info")(
                record.getMessage(), **fields
            )
        except Exception:  # a logger must never raise into the code that logs
            self.handleError(record)


def setup_logging(
    role: str,
    name: str = "",
    *,
    log_format: Literal["json", "text"] = "json",
    log_level: str = "info",
    stream: TextIO | None = None,
) -> None:
    """Call once, at the start of a process. Every line then carries `role` and `process` (default: role and pid)."""
    level = logging.getLevelNamesMapping()[log_level.upper()]
    constant = {"role": role, "process": name or f"{role}-{os.getpid()}"}

    def add_process(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.update(constant)
        return event

    structlog.configure(
        processors=[add_process, *_processors(log_format)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=stream or sys.stdout),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    root.setLevel(max(level, logging.WARNING) if level > logging.DEBUG else logging.INFO)


@contextlib.contextmanager
def log_context(**fields: Any) -> Iterator[None]:
    """Every line logged inside, by this task, carries the fields (typically request_id and epoch)."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


class Metrics:
    """Makes the metrics of one component in its own registry, all under one prefix."""

    def __init__(self, prefix: str = "lanewise", registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._prefix = prefix

    def counter(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"{self._prefix}_{name}", help_text, labels, registry=self.registry)

    def tally(self, name: str, help_text: str) -> Tally:
        """A counter without labels for a path where every microsecond counts; of one thread."""
        tally = Tally(f"{self._prefix}_{name}", help_text)
        self.registry.register(tally)
        return tally

    def spread(self, name: str, help_text: str) -> Spread:
        """A latency for such a path."""
        spread = Spread(f"{self._prefix}_{name}_seconds", help_text, LATENCY_BUCKETS_S)
        self.registry.register(spread)
        return spread

    def gauge(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"{self._prefix}_{name}", help_text, labels, registry=self.registry)

    def latency(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(
            f"{self._prefix}_{name}_seconds", help_text, labels, buckets=LATENCY_BUCKETS_S, registry=self.registry
        )
