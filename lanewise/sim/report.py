"""Numbers, tables and plots of simulated runs.

Owns: the JSON of docs/design.md §7 and how it is shown. Must not: simulate.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from lanewise.sim.bound import Bound
from lanewise.sim.cluster import Outcome
from lanewise.sim.prefill import Track

SHORT_TOKENS = 256  # uncached tokens at arrival, for every policy


def summarise(outcome: Outcome, slo_ttft_s: float, slo_tpot_s: float | None, bound: Bound | None) -> dict[str, Any]:
    """`out.json`. A shed request counts as infinite, written as null; latencies are in milliseconds."""
    config, tracks = outcome.config, outcome.tracks
    ttft = [inf if track.ttft_s is None else track.ttft_s for track in tracks]
    tpot = [value for track in tracks if (value := tpot_s(track)) is not None]
    good = sum(_attained(track, slo_ttft_s, slo_tpot_s) for track in tracks)
    uncached = [track.request.prompt_tokens - track.cached for track in tracks]
    short = [time for time, tokens in zip(ttft, uncached, strict=True) if tokens <= SHORT_TOKENS]
    long = [time for time, tokens in zip(ttft, uncached, strict=True) if tokens > SHORT_TOKENS]
    span = outcome.makespan_s or 1.0
    gpus = sum(profile.gpus for profile in (*config.prefill, *config.decode))
    return {
        "policy": config.policy,
        "routing": config.routing,
        "lanes": config.lanes,
        "trace": outcome.workload.name,
        "requests": len(tracks),
        "shed": outcome.shed,
        "makespan_s": round(outcome.makespan_s, 6),
        "throughput_rps": round((len(tracks) - outcome.shed) / span, 6),
        "ttft_ms": _milliseconds(ttft),
        "tpot_ms": _milliseconds(tpot),
        "slo_attainment": round(good / len(tracks), 6) if tracks else None,
        "goodput_rps": round(good / span, 6),
        "short_ttft_ms": _milliseconds(short),
        "long_ttft_ms": _milliseconds(long),
        "bound": _bound(bound),
        "gpu_seconds": round(gpus * span, 3),
        "utilisation": {
            "prefill": round(sum(outcome.prefill_busy_s) / span / max(len(config.prefill), 1), 4),
            "decode": round(sum(outcome.decode_busy_s) / span / len(config.decode), 4),
        },
        "prefill_batches": outcome.batches,
        "preemptions": outcome.preemptions,
        "lane_moves": outcome.lane_moves,
    }


def tpot_s(track: Track) -> float | None:
    """(last − first token)/(n − 1), the transfer gap included; None for one token or an unfinished request."""
    tokens = track.request.output_tokens
    if tokens < 2 or track.ttft_s is None or track.end_s is None:
        return None
    return (track.end_s - track.arrival_s - track.ttft_s) / (tokens - 1)


def _attained(track: Track, slo_ttft_s: float, slo_tpot_s: float | None) -> bool:
    if track.ttft_s is None or track.ttft_s > slo_ttft_s:
        return False
    tpot = tpot_s(track)
    return slo_tpot_s is None or tpot is None or tpot <= slo_tpot_s


def _bound(bound: Bound | None) -> dict[str, float] | None:
    if bound is None:
        return None
    return {"mean_ttft_ms": round(bound.mean_ttft_s * 1e3, 3), "slo_attainment": round(bound.attainment, 6)}


def quantile(ordered: Sequence[float], q: float) -> float:
    """Nearest rank of an ascending sequence."""
    return ordered[max(ceil(q * len(ordered)) - 1, 0)]


def _milliseconds(values: Sequence[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    ordered = sorted(values)
    found = {
        "mean": sum(ordered) / len(ordered),
        "p50": quantile(ordered, 0.5),
        "p90": quantile(ordered, 0.9),
        "p99": quantile(ordered, 0.99),
        "max": ordered[-1],
    }
    return {name: None if value == inf else round(value * 1e3, 3) for name, value in found.items()}


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per run, and the certificate below where there is one."""
    view = Table(title=f"{results[0]['trace']}: {results[0]['requests']} requests", title_justify="left", box=SIMPLE)
    for name in (
        "policy",
        "mean ms",
        "p50",
        "p90",
        "p99",
        "worst s",
        "on time",
        "short p50",
        "long p50",
        "good/s",
        "busy",
    ):
        view.add_column(name, justify="left" if name == "policy" else "right")
    for result in results:
        ttft = result["ttft_ms"] or {}
        view.add_row(
            label(result),
            _number(ttft.get("mean")),
            _number(ttft.get("p50")),
            _number(ttft.get("p90")),
            _number(ttft.get("p99")),
            _number(ttft.get("max"), 1e-3, 1),
            f"{100 * (result['slo_attainment'] or 0):.1f} %",
            _number((result["short_ttft_ms"] or {}).get("p50")),
            _number((result["long_ttft_ms"] or {}).get("p50")),
            f"{result['goodput_rps']:.2f}",
            f"{100 * result['utilisation']['prefill']:.0f} %",
        )
    bound = results[0]["bound"]
    if bound is not None:
        empty = [""] * 3
        share = f"≤ {100 * bound['slo_attainment']:.1f} %"
        view.add_row("(bound)", f"≥ {bound['mean_ttft_ms']:.0f}", *empty, "", share, "", "", "", "")
    return view


def label(result: dict[str, Any]) -> str:
    """How a run is called in tables: the batch policy, and the routing where it was chosen."""
    parts = [result["policy"]]
    if result["routing"] != "lanewise":
        parts.append(result["routing"])
    if result["lanes"] != "none":
        parts.append(result["lanes"])
    return "+".join(parts)


def _number(value: float | None, scale: float = 1.0, digits: int = 0) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def plot(outcomes: Sequence[tuple[str, Outcome]], slo_ttft_s: float, path: Path) -> None:
    """TTFT distributions side by side, on a logarithmic axis, with the target marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, outcome in outcomes:
        times = sorted(track.ttft_s * 1e3 for track in outcome.tracks if track.ttft_s is not None)
        share = [100 * (i + 1) / len(outcome.tracks) for i in range(len(times))]
        axes.plot(times, share, label=name, drawstyle="steps-post")
    axes.axvline(slo_ttft_s * 1e3, color="0.6", linestyle="--", linewidth=1, label="target")
    axes.set(xscale="log", xlabel="TTFT, ms", ylabel="requests, %", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
