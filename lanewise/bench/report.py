"""From samples to numbers: percentiles, throughput, goodput, errors. Definitions: docs/bench.md.

Owns: every formula of a benchmark report, its table and its JSON. Pure.
Must not: measure, print or draw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lanewise.bench.drive import Sample

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of one request; None: not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """One answered request in seconds."""

    ttft_s: float
    tpot_s: float | None  # None: fewer than two tokens
    itl_s: tuple[float, ...]
    e2e_s: float
    output_tokens: int


def times(sample: Sample) -> Times | None:
    """None where the request failed or brought nothing."""
    answer = sample.answer
    if answer.error or not answer.event_s:
        return None
    first, last = answer.event_s[0], answer.event_s[-1]
    tokens = answer.output_tokens if answer.output_tokens is not None else len(answer.event_s)
    return Times(
        ttft_s=first - sample.scheduled_s,
        tpot_s=(last - first) / (tokens - 1) if tokens > 1 else None,
        itl_s=tuple(after - before for before, after in pairwise(answer.event_s)),
        e2e_s=answer.end_s - sample.scheduled_s,
        output_tokens=tokens,
    )


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks (numpy's default)."""
    position = (len(sorted_values) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(sorted_values) - 1)
    return sorted_values[below] + (sorted_values[above] - sorted_values[below]) * (position - below)


def spread_ms(values: Iterable[float]) -> dict[str, float] | None:
    """mean, p50, p90, p99 and max in milliseconds; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    named = {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    found = {"mean": sum(ordered) / len(ordered), **named, "max": ordered[-1]}
    return {name: round(value * 1000, 3) for name, value in found.items()}


def met(found: Times | None, slo: Slo) -> bool:
    """Whether a request kept every target that was set. One that failed kept none."""
    if found is None:
        return False
    in_ttft = slo.ttft_s is None or found.ttft_s <= slo.ttft_s
    return in_ttft and (slo.tpot_s is None or found.tpot_s is None or found.tpot_s <= slo.tpot_s)


def summarise(samples: Sequence[Sample], slo: Slo) -> dict[str, Any]:
    """The whole report as plain data."""
    measured = [(sample, times(sample)) for sample in samples]
    good = [(sample, found) for sample, found in measured if found is not None]
    duration_s = _duration_s(samples)
    kept = sum(met(found, slo) for _, found in measured)
    errors = [sample.answer for sample, found in measured if found is None]
    kinds = Counter(answer.error or "no tokens" for answer in errors)
    details = {answer.error or "no tokens": answer.detail for answer in reversed(errors)}
    report: dict[str, Any] = {
        "requests": len(samples),
        "succeeded": len(good),
        "failed": len(errors),
        "errors": {kind: {"count": count, "example": details[kind]} for kind, count in kinds.most_common()},
        "duration_s": round(duration_s, 3),
        "ttft_ms": spread_ms(found.ttft_s for _, found in good),
        "tpot_ms": spread_ms(found.tpot_s for _, found in good if found.tpot_s is not None),
        "itl_ms": spread_ms(gap for _, found in good for gap in found.itl_s),
        "e2e_ms": spread_ms(found.e2e_s for _, found in good),
        "ttft_ms_by_prompt": _by_label(good),
        "request_rate": _rate(len(good), duration_s),
        "prompt_tokens_per_s": _rate(sum(_prompt_tokens(sample) for sample, _ in good), duration_s),
        "output_tokens_per_s": _rate(sum(found.output_tokens for _, found in good), duration_s),
        "prompt_tokens": sum(_prompt_tokens(sample) for sample, _ in good),
        "output_tokens": sum(found.output_tokens for _, found in good),
        "client_late_ms": spread_ms(sample.late_s for sample in samples),
    }
    if slo != Slo():
        report["slo"] = {
            "ttft_ms": _ms(slo.ttft_s),
            "tpot_ms": _ms(slo.tpot_s),
            "attainment": round(kept / len(samples), 4) if samples else None,
            "goodput_rps": _rate(kept, duration_s),
        }
    return report


def rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One record per request, in order of arrival, for the JSON file."""
    start = min((sample.scheduled_s for sample in samples), default=0.0)
    found = []
    for sample in sorted(samples, key=lambda sample: sample.ask.index):
        measured = times(sample)
        row: dict[str, Any] = {
            "index": sample.ask.index,
            "at_s": round(sample.scheduled_s - start, 6),
            "prompt_tokens": _prompt_tokens(sample),
            "asked_output_tokens": sample.ask.output_tokens,
            "error": sample.answer.error,
            "finish": sample.answer.finish,
        }
        if measured is not None:
            row |= {"ttft_ms": _ms(measured.ttft_s), "tpot_ms": _ms(measured.tpot_s), "e2e_ms": _ms(measured.e2e_s)}
            row["output_tokens"] = measured.output_tokens
        found.append(row)
    return found


def _by_label(good: Sequence[tuple[Sample, Times]]) -> dict[str, Any]:
    """TTFT apart for each class of prompt length; empty where there is only one."""
    labels = sorted({sample.ask.label for sample, _ in good}, key=lambda label: (len(label), label))
    if len(labels) < 2:
        return {}
    return {label: spread_ms(found.ttft_s for sample, found in good if sample.ask.label == label) for label in labels}


def _duration_s(samples: Sequence[Sample]) -> float:
    """From the first scheduled arrival to the end of the last answer."""
    if not samples:
        return 0.0
    return max(sample.answer.end_s for sample in samples) - min(sample.scheduled_s for sample in samples)


def _prompt_tokens(sample: Sample) -> int:
    counted = sample.answer.prompt_tokens
    return sample.ask.prompt_tokens if counted is None else counted


def _rate(amount: float, duration_s: float) -> float:
    return round(amount / duration_s, 3) if duration_s > 0 else 0.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def table(report: dict[str, Any]) -> str:
    """The report for people, in plain text that can be pasted."""
    columns = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")
    lines = [" " * 16 + "".join(f"{name:>11}" for name in columns)]
    named = [("TTFT ms", report["ttft_ms"])]
    named += [(f"  prompt {label}", spread) for label, spread in report["ttft_ms_by_prompt"].items()]
    named += [(f"{name.upper()} ms", report[f"{name}_ms"]) for name in ("tpot", "itl", "e2e")]
    for name, spread in named:
        cells = "".join(f"{spread[column]:>11.1f}" for column in columns) if spread else f"{'-':>11}"
        lines.append(f"{name:<16}{cells}")
    lines += [
        "",
        f"requests        {report['succeeded']} of {report['requests']} in {report['duration_s']:.1f} s",
        f"throughput      {report['request_rate']:.2f} requests/s, "
        f"{report['prompt_tokens_per_s']:.0f} prompt tokens/s, {report['output_tokens_per_s']:.0f} output tokens/s",
    ]
    slo = report.get("slo")
    if slo:
        targets = ", ".join(f"{name} {slo[f'{name}_ms']:g} ms" for name in ("ttft", "tpot") if slo[f"{name}_ms"])
        lines.append(f"goodput         {slo['goodput_rps']:.2f} requests/s, {slo['attainment']:.1%} within {targets}")
    lines += [
        f"error           {kind}: {found['count']} ({found['example']})" for kind, found in report["errors"].items()
    ]
    late = report["client_late_ms"]
    if late and late["p99"] > 10:
        lines.append(f"note            this client was {late['p99']:.0f} ms late at p99; its numbers include that")
    return "\n".join(lines)
