"""Draws a benchmark: where the latencies lie, when they happened, how much came through.

Owns: the figure. Must not: compute a number that the report does not define.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lanewise.bench.drive import Sample
from lanewise.bench.report import Slo, times
from lanewise.errors import ConfigError


def require() -> None:
    """Says what to install before the measurement and not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'lanewise[plot]'") from error


def draw(samples: Sequence[Sample], slo: Slo, title: str, path: str) -> None:
    """Writes the file; its suffix says the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    measured = [(sample, found) for sample in samples if (found := times(sample)) is not None]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    figure.suptitle(title)
    labels = sorted({sample.ask.label for sample, _ in measured}, key=lambda label: (len(label), label))
    for label in labels:
        mine = [(sample, found) for sample, found in measured if sample.ask.label == label]
        name = f"prompt {label}"
        _cumulative(axes[0][0], [found.ttft_s * 1000 for _, found in mine], name)
        _cumulative(axes[0][1], [found.tpot_s * 1000 for _, found in mine if found.tpot_s is not None], name)
        start = min(sample.scheduled_s for sample in samples)
        when = [sample.scheduled_s - start for sample, _ in mine]
        axes[1][0].scatter(when, [found.ttft_s * 1000 for _, found in mine], s=8, label=name)
    for axis, target in ((axes[0][0], slo.ttft_s), (axes[0][1], slo.tpot_s)):
        if target is not None:
            axis.axvline(target * 1000, color="black", linestyle=":", label="target")
    if slo.ttft_s is not None:
        axes[1][0].axhline(slo.ttft_s * 1000, color="black", linestyle=":")
    _dress(axes[0][0], "TTFT, ms", "share of requests")
    _dress(axes[0][1], "TPOT, ms", "share of requests")
    _dress(axes[1][0], "arrival, s", "TTFT, ms")
    _throughput(axes[1][1], samples)
    _dress(axes[1][1], "time, s", "output events per second")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _cumulative(axis: Any, values: list[float], label: str) -> None:
    ordered = sorted(values)
    if ordered:
        axis.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post", label=label)


def _throughput(axis: Any, samples: Sequence[Sample]) -> None:
    events = [when for sample in samples for when in sample.answer.event_s]
    if events:
        start = min(sample.scheduled_s for sample in samples)
        seconds = max(1, round(max(events) - start + 0.5))
        axis.hist([when - start for when in events], bins=seconds, range=(0, seconds), histtype="step")


def _dress(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")
