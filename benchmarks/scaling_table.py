"""The scaling table of docs/scaling.md: one day of two traces at three sizes, the policy beside what others ship.

Owns: which days, rules and settings make the table, and how it is printed.
Must not: hold a rule or a model; `lanewise.sim` and `lanewise.policy` do.

    python benchmarks/scaling_table.py [4] [12] [40]    the table or some of its sizes, by intervals (some 15 minutes)
    python benchmarks/scaling_table.py measure     first measures data/scaling_response.json again (about half an hour)
    python benchmarks/scaling_table.py events      the days of 4 GPUs, request by request, beside the interval model
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lanewise.policy.scaling_types import Rules
from lanewise.sim.cluster import SimConfig
from lanewise.sim.report import summarise
from lanewise.sim.scaling_cluster import ScaledService, simulate_scaled
from lanewise.sim.scaling_controllers import Controller, HpaUtilisation, KedaQueue, Policy, Schedule, Threshold
from lanewise.sim.scaling_day import Day, Mix, arrivals, mix_of
from lanewise.sim.scaling_interval import Result, World, run, turns
from lanewise.sim.scaling_response import Response, measure
from lanewise.sim.service import load_service
from lanewise.sim.workload import Workload, read_trace

HERE = Path(__file__).parent
DATA = HERE / "data"
RESPONSES = DATA / "scaling_response.json"
SERVICE = HERE.parent / "deploy" / "samples" / "sim-h200-qwen2.5-32b.yaml"
SEEDS = {4: (1, 2, 3, 4, 5), 12: (1, 2, 3), 40: (1, 2, 3)}
"""By GPUs at peak: the fewer requests a day has, the more a seed moves it. Figures are medians over them."""
PEAK_TO_TROUGH = 4.0
START_S = 60.0
STEP_S = 300.0  # of the clairvoyant schedule
LATE = 0.03  # of the requests that idle workers would serve on time, at every moment
TPOT_S = 0.05
EQUAL = 0.001  # attainments nearer than this count as equal
POINT = 0.01
Course = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Trace:
    name: str
    files: tuple[str, ...]  # of several as many requests each
    ttft_s: float
    cache: str


AZURE, MOONCAKE = "azure_llm_2023_conv.csv.gz", "mooncake_conversation.csv.gz"
TRACES = (
    Trace("azure conv", (AZURE,), 1.0, "none"),
    Trace("mooncake conv", (MOONCAKE,), 5.0, "ideal"),
)


@cache
def mix(trace: Trace) -> Mix:
    cost = load_service(SERVICE).prefill_profile.cost
    found = [read_trace(DATA / file).requests for file in trace.files]
    fewest = min(map(len, found))
    requests = tuple(request for each in found for request in each[:fewest])
    return mix_of(Workload(trace.name, requests), cost, trace.ttft_s, trace.cache == "ideal")


@cache
def response(trace: Trace) -> Response:
    return Response.from_mapping(json.loads(RESPONSES.read_text(encoding="utf-8"))[trace.name])


def goal(trace: Trace) -> float:
    """Share on time that every interval is to keep: of those whose targets idle workers would meet."""
    found = response(trace)
    return (1 - LATE) * found.attained.at(1, 0.0) * found.tpot.at(1, 0.0)


class Cell:
    """One trace at one size, drawn with one seed; the day is a sine unless it has another course."""

    def __init__(self, trace: Trace, gpus: int, seed: int, course: Course = ()) -> None:
        self.trace, self.gpus, self.seed = trace, gpus, seed
        self.most = (gpus + 8, gpus + 8)
        self.profile = load_service(SERVICE).prefill_profile
        self._flat = self._world(Day(1.0, 1.0), empty=True)
        self.peak_rps = self._peak()
        self.world = self._world(Day(self.peak_rps, self.peak_rps / PEAK_TO_TROUGH, course=course))

    def _world(self, day: Day, empty: bool = False) -> World:
        args = (day, mix(self.trace), response(self.trace), self.profile, self.trace.ttft_s, TPOT_S, START_S)
        return World(*args, (), self.seed) if empty else World.make(*args, self.seed)

    def least(self, rate: float) -> tuple[int, int]:
        """The fewest workers that keep the goal at a steady rate; prefill time is never planned above all of it."""
        wanted, best = goal(self.trace), None
        for decode in range(1, self.most[1] + 1):
            if rate > decode * self._flat.response.full_rate:
                continue
            for prefill in range(1, self.most[0] + 1):
                if best is not None and prefill + decode >= sum(best):
                    break
                busy = rate * self._flat.mix.work_s / prefill
                if busy <= 1 and self._flat.on_time(prefill, decode, rate) >= wanted:
                    best = prefill, decode
                    break
        return best or self.most

    def _peak(self) -> float:
        """The highest rate that this many GPUs hold."""
        low, high = 0.0, self.gpus * 60.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(self.least(middle)) <= self.gpus else (low, middle)
        return low

    @property
    def rules(self) -> Rules:
        return Rules(
            1, self.most[0], 1, self.most[1], self.trace.ttft_s, TPOT_S, max_ratio_percent=2000, late_share=LATE
        )

    def clairvoyant(self) -> Schedule:
        """For every five minutes the fewest workers that keep the goal at its highest rate, asked for in time."""
        day, steps = self.world.day, []
        for number in range(int(day.seconds / STEP_S)):
            at = number * STEP_S
            rate = max(day.rate(at), day.rate(at + STEP_S / 2), day.rate(at + STEP_S))
            steps.append((at, *self.least(rate)))
        return Schedule(steps, START_S)

    def static(self) -> tuple[int, int]:
        return self.least(self.peak_rps)

    def first(self) -> tuple[int, int]:
        """What runs at midnight."""
        return self.least(self.world.day.rate(0.0))

    def run(self, controller: Controller, first: tuple[int, int] | None = None) -> Result:
        return run(self.world, controller, first or self.first())


def baselines(cell: Cell) -> Iterator[tuple[str, str, Callable[[], Controller]]]:
    """(rule, setting, controller): each rule at ten settings."""
    most = cell.most
    for busy, kv in product((0.6, 0.7, 0.8, 0.87, 0.93), (0.6, 0.8)):
        yield "HPA utilisation", f"{busy:g}/{kv:g}", lambda b=busy, k=kv: HpaUtilisation(b, k, most)  # type: ignore[misc]
    held = cell.profile.kv_capacity_tokens / (mix(cell.trace).prompt_tokens + mix(cell.trace).output_tokens)
    for queue, share in product((0.8, 1.1, 1.6, 2.5, 5.0), (0.6, 0.8)):
        name = f"{queue:g}/{share * held:.0f}"
        yield "KEDA queue", name, lambda q=queue, s=share: KedaQueue(q, s * held, most)  # type: ignore[misc]
    for kv, queue, spare in product((0.65, 0.8), (0.25, 0.5, 1.0, 2.0, 5.0), (0.3,)):
        name = f"{kv:g}/{queue:g}/{spare:g}"
        yield "threshold", name, lambda k=kv, q=queue, s=spare: Threshold(k, q, s, most, START_S)  # type: ignore[misc]


def best_of(cell: Cell, attained: float) -> dict[str, tuple[str, Result] | None]:
    """Of each rule the setting with the fewest GPU-hours among those that attain as much."""
    found: dict[str, tuple[str, Result] | None] = {}
    for rule, setting, make in baselines(cell):
        found.setdefault(rule, None)
        result = cell.run(make())
        best = found[rule]
        if result.attained >= attained - EQUAL and (best is None or result.gpu_hours < best[1].gpu_hours):
            found[rule] = setting, result
    return found


@dataclass(frozen=True)
class Found:
    """What one cell came to."""

    static: float
    clairvoyant: Result
    ours: Result
    others: dict[str, float]  # rule -> GPU-hours at its best setting; infinite where none attains as much

    @property
    def good(self) -> bool:
        """Near clairvoyance in attainment, and calm."""
        return self.ours.attained >= self.clairvoyant.attained - POINT and max(self.ours.turns()) <= 6


def found_in(cell: Cell) -> Found:
    clairvoyant, ours = cell.run(cell.clairvoyant()), cell.run(Policy(cell.rules))
    others = best_of(cell, ours.attained).items()
    hours = {rule: best[1].gpu_hours if best else math.inf for rule, best in others}
    return Found(24.0 * sum(cell.static()), clairvoyant, ours, hours)


@dataclass(frozen=True)
class Row:
    """One line of a table: the same day with several seeds."""

    trace: Trace
    gpus: int
    seeds: tuple[int, ...]
    course: Course = ()


def table(console: Console, rows: Sequence[Row], title: str = "one day, 4:1, 60 s pod start") -> bool:
    """Prints the table; True where every target is reached."""
    view = Table(box=SIMPLE, title=f"{title}: GPU-hours (share on time)", title_justify="left")
    names = ("trace", "GPUs at peak", "seeds", "static", "clairvoyant", "policy", "× clairv.", "× static", "turns p/d")
    for name in (*names, "HPA utilisation", "KEDA queue", "threshold"):
        view.add_column(name, no_wrap=name in names)
    good = True
    for row in rows:
        started, name = time.monotonic(), row.trace.name
        cells = [found_in(Cell(row.trace, row.gpus, seed, row.course)) for seed in row.seeds]
        static, ideal = median(c.static for c in cells), median(c.clairvoyant.gpu_hours for c in cells)
        hours = median(c.ours.gpu_hours for c in cells)
        ratio = median(c.ours.gpu_hours / c.clairvoyant.gpu_hours for c in cells)
        beside = {rule: [c.others[rule] / c.ours.gpu_hours for c in cells] for rule in cells[0].others}
        fewer = all(median(ratios) > 1 for ratios in beside.values())
        reached = ratio <= 1.15 and fewer and all(c.good for c in cells)
        good &= reached
        turned = [max(c.ours.turns()[role] for c in cells) for role in (0, 1)]
        view.add_row(
            name,
            str(row.gpus),
            str(len(cells)),
            f"{static:.0f}",
            f"{ideal:.1f} ({100 * median(c.clairvoyant.attained for c in cells):.1f} %)",
            f"{hours:.1f} ({100 * median(c.ours.attained for c in cells):.1f} %)" + ("" if reached else " ✗"),
            f"{ratio:.3f}",
            f"{hours / static:.2f} (clairv. {ideal / static:.2f})",
            f"{turned[0]}/{turned[1]}",
            *(_spread(ratios) for ratios in beside.values()),
        )
        console.print(f"{name} {row.gpus}: {time.monotonic() - started:.0f} s", style="dim")
    console.print(view)
    return good


def _spread(ratios: Sequence[float]) -> str:
    """Times the policy's GPU-hours: median (least to most)."""
    shown = ["none attains it" if math.isinf(r) else f"{r:.3f}" for r in (median(ratios), min(ratios), max(ratios))]
    return shown[0] if len(set(shown)) == 1 else f"× {shown[0]} ({shown[1]}-{shown[2]})"


def measure_all(console: Console, traces: Sequence[Trace]) -> None:
    profile = load_service(SERVICE).prefill_profile
    found = json.loads(RESPONSES.read_text(encoding="utf-8"))
    for trace in traces:
        made = measure(mix(trace), profile, trace.ttft_s, TPOT_S, trace.cache, console.print)
        found[trace.name] = made.to_mapping()
        RESPONSES.write_text(json.dumps(found) + "\n", encoding="utf-8")


def events(console: Console) -> None:
    """The smallest days request by request: the same controllers, and what the interval model said of them."""
    view = Table(box=SIMPLE, title="4 GPUs, every request simulated", title_justify="left")
    for name in ("trace", "controller", "GPU-hours", "on time", "turns p/d", "by intervals"):
        view.add_column(name)
    for trace in reversed(TRACES):
        cell = Cell(trace, 4, 1)
        config = SimConfig(
            (cell.profile,) * cell.most[0],
            (cell.profile,) * cell.most[1],
            ttft_target_s=trace.ttft_s,
            tpot_target_s=TPOT_S,
            max_batch_tokens=8192,
            cache=trace.cache,
        )
        workload = arrivals(cell.world.day, mix(trace), cell.seed)
        makes: tuple[tuple[str, Callable[[], Controller]], ...] = (
            ("policy", lambda cell=cell: Policy(cell.rules)),  # type: ignore[misc]
            ("clairvoyant", cell.clairvoyant),
        )
        for name, make in makes:
            outcome, scaled = simulate_scaled(ScaledService(config, cell.first(), START_S), workload, make())
            share = summarise(outcome, trace.ttft_s, TPOT_S, None)["slo_attainment"]
            quick = cell.run(make())
            p, d = turns([move[1] for move in scaled.moves]), turns([move[2] for move in scaled.moves])
            interval = f"{quick.gpu_hours:.1f}, {100 * quick.attained:.1f} %"
            view.add_row(trace.name, name, f"{scaled.gpu_hours:.1f}", f"{100 * share:.1f} %", f"{p}/{d}", interval)
            console.print(f"{trace.name} {name} done", style="dim")
    console.print(view)


def main() -> int:
    """Exit status 1 where a target is missed."""
    console = Console() if sys.stdout.isatty() else Console(width=220)
    sizes = [size for size in SEEDS if str(size) in sys.argv[1:]]
    parts = set(sys.argv[1:]) - {str(size) for size in sizes}
    if unknown := parts - {"measure", "events"}:
        print(f"scaling_table: unknown part {sorted(unknown)[0]!r}; known: measure, events, {SEEDS}", file=sys.stderr)
        return 2
    if "measure" in parts:
        measure_all(console, TRACES)
    if "events" in parts:
        events(console)
    if "events" in parts and not sizes:
        return 0
    rows = [Row(trace, size, SEEDS[size]) for trace, size in product(TRACES, sizes or SEEDS)]
    return 0 if table(console, rows) else 1


if __name__ == "__main__":
    sys.exit(main())
