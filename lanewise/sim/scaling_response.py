"""How a cluster of a given size answers a steady load, measured with the event simulator and looked up between.

Owns: the runs, the tables and the interpolation. Must not: know scaling; a response is a fact about the cluster.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from typing import Any

from lanewise.policy.cost import CostModel
from lanewise.policy.profile import Profile
from lanewise.policy.scaling_capacity import step_s
from lanewise.sim.cluster import Outcome, SimConfig
from lanewise.sim.report import tpot_s
from lanewise.sim.scaling_cluster import CountingCluster
from lanewise.sim.scaling_day import Mix
from lanewise.sim.workload import Workload, one_token

PREFILL_COUNTS = (1, 2, 3, 4, 6, 10, 18)  # beyond the last, its row: more workers share waits better still
PREFILL_LOADS = (0.3, 0.55, 0.7, 0.8, 0.87, 0.93, 1.0, 1.1, 1.3)  # of the workers' time
DECODE_COUNTS = (1, 2, 4, 8)
DECODE_LOADS = (0.3, 0.45, 0.6, 0.7, 0.8, 0.87, 0.93, 0.98)  # of `full_rate`: beyond it nothing is steady
WARM = 0.2  # of each run is left out
INSTANT = CostModel(*([1e-18] * 12))  # the attention of a long prompt is 1e10 pairs
FULL_WORKERS, FULL_TRACES, FULL_OFFER = 2, 2, 1.4  # of the run that measures `full_rate`


@dataclass(frozen=True, slots=True)
class Table:
    """A share by count and load, linear between the cells (logarithmic in the count)."""

    counts: tuple[int, ...]
    loads: tuple[float, ...]
    cells: tuple[tuple[float, ...], ...]  # [count][load]

    def at(self, count: int, load: float) -> float:
        if count < 1:
            return 0.0
        high = min(bisect_right(self.counts, count), len(self.counts) - 1)
        low = max(high - 1, 0)
        first, second = self._row(low, load), self._row(high, load)
        if low == high or count >= self.counts[-1]:
            return second
        place = log(count / self.counts[low]) / log(self.counts[high] / self.counts[low])
        return first + place * (second - first)

    def _row(self, index: int, load: float) -> float:
        row, loads = self.cells[index], self.loads
        if load <= loads[0]:
            return row[0]
        if load >= loads[-1]:
            return row[-1] * loads[-1] / load  # overloaded: what is served stays, the share falls
        high = bisect_right(loads, load)
        part = (load - loads[high - 1]) / (loads[high] - loads[high - 1])
        return row[high - 1] + part * (row[high] - row[high - 1])


@dataclass(frozen=True, slots=True)
class Response:
    """Shares on time by size and load. `attained`: of all requests; `kept`: of those that could be on time alone."""

    attained: Table
    kept: Table
    tpot: Table
    full_rate: float  # requests a second that one decode worker ends while more wait: load 1 of `tpot`

    def to_mapping(self) -> dict[str, Any]:
        tables = {name: getattr(self, name) for name in ("attained", "kept", "tpot")}
        return {"full_rate": self.full_rate} | {
            name: {"counts": t.counts, "loads": t.loads, "cells": t.cells} for name, t in tables.items()
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Response:
        def table(name: str) -> Table:
            entry = data[name]
            return Table(tuple(entry["counts"]), tuple(entry["loads"]), tuple(map(tuple, entry["cells"])))

        return cls(table("attained"), table("kept"), table("tpot"), float(data["full_rate"]))


def full_rate(mix: Mix, profile: Profile, tpot_target_s: float, seed: int = 0) -> float:
    """Requests a second that a decode worker ends while more wait for it than it can hold."""
    context = mix.prompt_tokens + mix.output_tokens
    held = profile.kv_capacity_tokens / context
    guess = held / (mix.output_tokens * step_s(held, context, profile.cost))
    rate = FULL_OFFER * guess * FULL_WORKERS
    outcome = _decoded(mix, profile, tpot_target_s, FULL_WORKERS, rate, FULL_TRACES * len(mix.requests), seed)
    last = outcome.tracks[-1].arrival_s
    ended = sum(track.end_s is not None and WARM * last <= track.end_s < last for track in outcome.tracks)
    return ended / ((1 - WARM) * last) / FULL_WORKERS


def measure(
    mix: Mix,
    profile: Profile,
    ttft_s: float,
    tpot_target_s: float,
    cache: str,
    on_run: Callable[[str], None],
    seed: int = 0,
) -> Response:
    """Runs every cell. A minute or two of one core."""
    attained, kept = [], []
    for count in PREFILL_COUNTS:
        cells = [prefill_cell(mix, profile, ttft_s, cache, count, load, seed) for load in PREFILL_LOADS]
        attained.append(_falling([cell[0] for cell in cells]))
        kept.append(_falling([cell[1] for cell in cells]))
        on_run(f"{mix.name}: {count} prefill")
    full = full_rate(mix, profile, tpot_target_s, seed)
    return Response(
        Table(PREFILL_COUNTS, PREFILL_LOADS, tuple(attained)),
        Table(PREFILL_COUNTS, PREFILL_LOADS, tuple(kept)),
        measure_decode(mix, profile, tpot_target_s, full, on_run, seed),
        full,
    )


def measure_decode(
    mix: Mix, profile: Profile, tpot_target_s: float, rate: float, on_run: Callable[[str], None], seed: int = 0
) -> Table:
    """Shares within the TPOT target; `rate`: that of a full worker."""
    cells = []
    for count in DECODE_COUNTS:
        shares = [decode_cell(mix, profile, tpot_target_s, count, load * rate * count, seed) for load in DECODE_LOADS]
        cells.append(_falling(shares))
        on_run(f"{mix.name}: {count} decode")
    return Table(DECODE_COUNTS, DECODE_LOADS, tuple(cells))


def _falling(shares: Sequence[float]) -> tuple[float, ...]:
    """More load is never better: takes out the noise of finite runs."""
    values = list(shares)
    for before, after in pairwise(range(len(values))):
        values[after] = min(values[after], values[before])
    return tuple(round(value, 5) for value in values)


def prefill_cell(
    mix: Mix, profile: Profile, ttft_s: float, cache: str, count: int, load: float, seed: int
) -> tuple[float, float]:
    """(share on time of all, of those that could be) of `count` workers at `load` of their time; one output token."""
    rate = load * count / mix.work_s
    requests = max(int(2000 * min(count, 4) ** 0.5), int(rate * 30))
    config = SimConfig((profile,) * count, (profile,), ttft_target_s=ttft_s, max_batch_tokens=8192, cache=cache)
    outcome, drawn = _steady(mix, config, rate, requests, seed, one=True)
    met = [track.ttft_s is not None and track.ttft_s <= ttft_s for track in outcome.tracks]
    could = [mix.shapes[index].attainable for index in drawn]
    first = int(WARM * len(met))
    all_met, all_could = met[first:], could[first:]
    both = sum(m and c for m, c in zip(all_met, all_could, strict=True))
    return sum(all_met) / len(all_met), both / max(sum(all_could), 1)


def decode_cell(mix: Mix, profile: Profile, tpot_target_s: float, count: int, rate: float, seed: int) -> float:
    """Share within the TPOT target of `count` decode workers behind a prefill that takes no time."""
    requests = max(len(mix.requests), int(rate * 30 * mix.output_tokens * 0.03))  # at least some thirty lifetimes
    outcome = _decoded(mix, profile, tpot_target_s, count, rate, requests, seed)
    tpots = [tpot_s(track) for track in outcome.tracks[int(WARM * requests) :]]
    return sum(value is None or value <= tpot_target_s for value in tpots) / len(tpots)


def _decoded(
    mix: Mix, profile: Profile, tpot_target_s: float, count: int, rate: float, requests: int, seed: int
) -> Outcome:
    """A steady load on decode workers behind a prefill that takes no time."""
    instant = replace(profile, cost=INSTANT)
    config = SimConfig((instant,), (profile,) * count, tpot_target_s=tpot_target_s, max_batch_tokens=1 << 20)
    return _steady(mix, config, rate, requests, seed, one=False)[0]


def _steady(mix: Mix, config: SimConfig, rate: float, requests: int, seed: int, one: bool) -> tuple[Outcome, list[int]]:
    """Whole traces, shuffled, at random times: with requests drawn at random the load would be off by percents."""
    draw, every = random.Random(seed), range(len(mix.requests))
    drawn: list[int] = []
    while len(drawn) < requests:
        drawn += draw.sample(every, len(every))
    drawn = drawn[:requests]
    now, rows = 0.0, []
    for number, index in enumerate(drawn):
        now += draw.expovariate(rate)
        rows.append(replace(mix.requests[index], index=number, arrival_s=now))
    workload = Workload(mix.name, tuple(rows))
    return CountingCluster(config, one_token(workload) if one else workload).run(), drawn
