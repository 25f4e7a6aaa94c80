"""The live line of a benchmark on a terminal.

Owns: what is shown while requests run. Must not: slow the measurement (it redraws four times a second at most).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lanewise.bench.drive import Sample
from lanewise.bench.report import times


@contextmanager
def live(total: int) -> Iterator[Callable[[Sample], None]]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )
    failed = 0
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4, transient=True) as progress:
        task = progress.add_task("requests", total=total, last="")

        def advance(sample: Sample) -> None:
            nonlocal failed
            found = times(sample)
            failed += found is None
            last = f"TTFT {found.ttft_s * 1000:.0f} ms" if found else str(sample.answer.error)
            progress.update(task, advance=1, last=last + (f"  failed {failed}" if failed else ""))

        yield advance
