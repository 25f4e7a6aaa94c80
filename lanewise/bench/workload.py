"""What a benchmark asks, and when: lengths, arrival times and prompts from one seed.

Owns: the length grammar, Poisson and trace arrivals, prompts that share no prefix.
Must not: read a clock, wait or send anything.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lanewise.errors import ConfigError

TRACE_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
MAX_LENGTH = 10_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """One class of lengths: uniform from `low` to `high`, both included."""

    share: float
    low: int
    high: int

    @property
    def label(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """`N`, `A-B`, or a mix such as `80%:64,20%:1536`; every part of a mix may be a range."""

    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        pieces = [piece.strip() for piece in text.split(",")]
        if len(pieces) == 1 and ":" not in text:
            low, high = _range(text, text)
            return cls((Part(1.0, low, high),))
        parts = []
        for piece in pieces:
            share, colon, span = piece.partition(":")
            if not colon or not share.endswith("%"):
                raise ConfigError(f"expected lengths such as 64, 32-96 or 80%:64,20%:1536, got {text!r}")
            try:
                percent = float(share[:-1])
            except ValueError:
                percent = math.nan
            if not 0 < percent <= 100:
                raise ConfigError(f"expected a share above 0% and up to 100%, got {share!r} in {text!r}")
            parts.append(Part(percent / 100, *_range(span, text)))
        total = sum(part.share for part in parts)
        if abs(total - 1) > 1e-6:
            raise ConfigError(f"expected shares that add up to 100%, got {total:.4g} x 100% in {text!r}")
        return cls(tuple(parts))

    def draw(self, rng: random.Random) -> tuple[int, str]:
        """(length, label of its class)."""
        part = rng.choices(self.parts, [part.share for part in self.parts])[0]
        return rng.randint(part.low, part.high), part.label


def _range(span: str, whole: str) -> tuple[int, int]:
    low, dash, high = span.strip().partition("-")
    if not low.isdigit() or (dash and not high.isdigit()):
        raise ConfigError(f"expected lengths such as 64, 32-96 or 80%:64,20%:1536, got {whole!r}")
    first, last = int(low), int(high or low)
    if not 1 <= first <= last <= MAX_LENGTH:
        raise ConfigError(f"expected lengths from 1 up, the smaller first, got {span!r}")
    return first, last


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to come."""

    index: int
    arrival_s: float | None  # None: as soon as a slot of the closed loop is free
    prompt_tokens: int
    output_tokens: int
    label: str  # class of prompt length, for the table


def synthetic(num_requests: int, rate: float | None, prompts: Lengths, outputs: Lengths, seed: int) -> list[Ask]:
    """Requests with drawn lengths; with a rate, Poisson arrivals from time 0."""
    lengths, gaps = random.Random(f"{seed}/lengths"), random.Random(f"{seed}/arrivals")
    asks, now = [], 0.0
    for index in range(num_requests):
        prompt, label = prompts.draw(lengths)
        output, _ = outputs.draw(lengths)
        asks.append(Ask(index, None if rate is None else now, prompt, output, label))
        now += gaps.expovariate(rate) if rate is not None else 0.0
    return asks


def from_trace(path: str | Path, num_requests: int | None, rate_scale: float = 1.0) -> list[Ask]:
    """Requests of a CSV file, its first arrival moved to time 0. `rate_scale` 2 means twice as fast."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in TRACE_COLUMNS[:2] if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path}:1: no column {missing[0]}; expected {','.join(TRACE_COLUMNS)}")
            rows = [_trace_row(row, f"{path}:{reader.line_num}") for row in itertools.islice(reader, num_requests)]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if not rows:
        raise ConfigError(f"{path}: no requests in it")
    rows.sort(key=lambda row: row[0])
    first = rows[0][0]
    short = 256  # the simulator's border between short and long
    return [
        Ask(i, (arrival - first) / rate_scale, prompt, output, f"<={short}" if prompt <= short else f">{short}")
        for i, (arrival, prompt, output) in enumerate(rows)
    ]


def _trace_row(row: dict[str, str], where: str) -> tuple[float, int, int]:
    try:
        arrival, prompt = float(row["arrival_s"]), int(row["prompt_tokens"])
        output = int(row.get("output_tokens") or 1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: expected numbers in {','.join(TRACE_COLUMNS)}") from error
    if not math.isfinite(arrival) or prompt < 1 or output < 1:
        raise ConfigError(f"{where}: expected a finite arrival_s and at least 1 token each way")
    return arrival, prompt, output


class Prompts:
    """Contents for given lengths. No two share a beginning, so no prefix cache can answer in the model's place."""

    def __init__(self, seed: int, token_range: tuple[int, int], words: Sequence[str] | None = None) -> None:
        self._seed = seed
        self._low, self._high = token_range
        self._words = words

    def make(self, index: int, num_tokens: int) -> list[int] | str:
        """Token ids; or about as many words, where the endpoint takes only text."""
        rng = random.Random(f"{self._seed}/prompt/{index}")
        if self._words is None:
            return [rng.randint(self._low, self._high) for _ in range(num_tokens)]
        start = rng.randrange(len(self._words))
        words = itertools.islice(itertools.cycle(self._words), start, start + max(0, num_tokens - 1))
        # The number makes the beginning unique also where the same place of the text is drawn twice.
        return " ".join((f"{rng.randrange(10**6)}", *words))


def read_words(path: str) -> list[str]:
    """Words of a text file; without a path, made-up ones."""
    if not path:
        return list(_made_up_words(random.Random(0), 5000))
    try:
        words = Path(path).read_text(encoding="utf-8", errors="replace").split()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if not words:
        raise ConfigError(f"{path}: no words in it")
    return words


def _made_up_words(rng: random.Random, count: int) -> Iterator[str]:
    for _ in range(count):
        yield "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
