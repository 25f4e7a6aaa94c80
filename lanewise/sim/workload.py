"""Requests to simulate: traces from CSV, Poisson arrivals over given lengths, closed loops.

Owns: reading and transforming arrivals; every draw comes from a seed. Must not: schedule anything.
"""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lanewise.errors import ConfigError

BLOCK_TOKENS = 512  # of the `block_ids_512` column


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a trace. `block_ranges` names the prompt's 512-token blocks as inclusive ranges of ids."""

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int = 1
    ideal_hit_tokens: int = 0
    block_ranges: tuple[tuple[int, int], ...] = ()

    def blocks(self) -> Iterable[int]:
        for first, last in self.block_ranges:
            yield from range(first, last + 1)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in arrival order; with `concurrency`, a closed loop that ignores their arrival times."""

    name: str
    requests: tuple[Request, ...]
    concurrency: int | None = None
    has_cache_columns: bool = False


def read_trace(path: Path) -> Workload:
    """A CSV of `arrival_s,prompt_tokens[,output_tokens,ideal_hit_tokens,block_ids_512]`, plain or gzip'ed.

    Without `arrival_s` all requests arrive at 0, as for a closed loop or `poisson`.
    """
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            length = next((name for name in columns if name.startswith("prompt_tokens")), None)
            if length is None:
                raise ConfigError(f"{path}: no column prompt_tokens; found {', '.join(columns) or 'nothing'}")
            requests = [_row(index, row, length) for index, row in enumerate(reader)]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not requests:
        raise ConfigError(f"{path}: no requests")
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    cache = "ideal_hit_tokens" in columns and "block_ids_512" in columns
    return Workload(name, _in_order(requests), has_cache_columns=cache)


def _row(index: int, row: dict[str, str], length: str) -> Request:
    ranges = []
    for part in (row.get("block_ids_512") or "").split():
        first, _, last = part.partition("-")
        ranges.append((int(first), int(last or first)))
    request = Request(
        index,
        float(row.get("arrival_s") or 0.0),
        int(row[length]),
        int(row.get("output_tokens") or 1),
        int(row.get("ideal_hit_tokens") or 0),
        tuple(ranges),
    )
    if request.arrival_s < 0 or request.prompt_tokens < 1 or request.output_tokens < 1:
        raise ValueError(f"row {index + 1}: arrival must not be negative, and prompt and output at least one token")
    return request


def _in_order(requests: Iterable[Request]) -> tuple[Request, ...]:
    return tuple(sorted(requests, key=lambda request: (request.arrival_s, request.index)))


def select(workload: Workload, *, every: int = 1, limit: int | None = None) -> Workload:
    """Rows 0, every, 2·every …, then the first `limit` of them."""
    return replace(workload, requests=workload.requests[::every][:limit])


def jitter(workload: Workload, seconds: float, seed: int) -> Workload:
    """Adds U(0, seconds) to each arrival: undoes the quantised clock of some traces."""
    draw = random.Random(seed)
    moved = [replace(r, arrival_s=r.arrival_s + draw.uniform(0.0, seconds)) for r in workload.requests]
    return replace(workload, requests=_in_order(moved))


def scale_rate(workload: Workload, factor: float) -> Workload:
    """The same requests, `factor` times as fast."""
    moved = tuple(replace(r, arrival_s=r.arrival_s / factor) for r in workload.requests)
    return replace(workload, requests=moved)


def poisson(workload: Workload, rate: float, seed: int) -> Workload:
    """The same lengths in the same order, arriving as a Poisson process."""
    draw = random.Random(seed)
    now, moved = 0.0, []
    for request in workload.requests:
        now += draw.expovariate(rate)
        moved.append(replace(request, arrival_s=now))
    return replace(workload, requests=tuple(moved))


def one_token(workload: Workload) -> Workload:
    """Outputs of one token: what prefill alone does."""
    return replace(workload, requests=tuple(replace(r, output_tokens=1) for r in workload.requests))


def closed_loop(workload: Workload, concurrency: int) -> Workload:
    """Every client sends its next request when its last one has ended."""
    return replace(workload, concurrency=concurrency)


def from_lengths(name: str, prompts: Sequence[int], output_tokens: int = 1) -> Workload:
    """Prompts of these lengths, all at time 0."""
    return Workload(name, tuple(Request(i, 0.0, n, output_tokens) for i, n in enumerate(prompts)))
