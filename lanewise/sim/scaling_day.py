"""A day of load: requests of a trace drawn again for a rate that swings once a day.

Owns: the rate, the draws (all from a seed), and their sums per second and period. Must not: serve anything.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import cos, exp, pi, sqrt
from operator import itemgetter
from typing import NamedTuple

from lanewise.policy.cost import CostModel
from lanewise.policy.scaling_capacity import batch_rate
from lanewise.policy.scaling_meter import OWN_SHARE
from lanewise.policy.scaling_types import Demand
from lanewise.sim.workload import Request, Workload

DAY_S = 86_400.0
TROUGH_S = 4 * 3600.0  # the quietest time of day


class Shape(NamedTuple):
    """A request as scaling sees it."""

    prompt: int
    uncached: int
    output: int
    work_s: float  # prefill time in a full batch
    attainable: bool  # alone it would meet the TTFT target


@dataclass(frozen=True)
class Mix:
    """The requests of a trace, to draw from, and their means."""

    name: str
    requests: tuple[Request, ...]
    shapes: tuple[Shape, ...]

    @cached_property
    def work_s(self) -> float:
        return sum(shape.work_s for shape in self.shapes) / len(self.shapes)

    @cached_property
    def _outputs(self) -> list[int]:
        return sorted(shape.output for shape in self.shapes)

    def longer_than(self, tokens: float) -> float:
        """Share of outputs of more than so many tokens."""
        return 1 - bisect_right(self._outputs, tokens) / len(self._outputs)

    @cached_property
    def prompt_tokens(self) -> float:
        return sum(shape.prompt for shape in self.shapes) / len(self.shapes)

    @cached_property
    def uncached_tokens(self) -> float:
        return sum(shape.uncached for shape in self.shapes) / len(self.shapes)

    @cached_property
    def output_tokens(self) -> float:
        return sum(shape.output for shape in self.shapes) / len(self.shapes)


def mix_of(workload: Workload, cost: CostModel, ttft_s: float, cached: bool) -> Mix:
    """`cached`: each request finds the prefix that an unbounded cache would hold."""
    per_token = batch_rate(cost, ttft_s)
    shapes = []
    for request in workload.requests:
        hit = min(request.ideal_hit_tokens, request.prompt_tokens - 1) if cached else 0
        new = request.prompt_tokens - hit
        work = per_token * new + cost.attention(new, hit) + cost.request_s
        shapes.append(
            Shape(request.prompt_tokens, new, request.output_tokens, work, cost.alone(new, hit) <= OWN_SHARE * ttft_s)
        )
    return Mix(workload.name, workload.requests, tuple(shapes))


@dataclass(frozen=True, slots=True)
class Day:
    """The rate over time: a sine between peak and trough, or constant where both are equal.

    `course`: (share of the day, share of the way from trough to peak), ascending from 0 to 1, straight between.
    """

    peak_rps: float
    trough_rps: float
    seconds: float = DAY_S
    course: tuple[tuple[float, float], ...] = ()

    def rate(self, at_s: float) -> float:
        if self.course:
            return self.trough_rps + (self.peak_rps - self.trough_rps) * self._way(at_s % self.seconds / self.seconds)
        middle, swing = (self.peak_rps + self.trough_rps) / 2, (self.peak_rps - self.trough_rps) / 2
        return middle - swing * cos(2 * pi * (at_s - TROUGH_S * self.seconds / DAY_S) / self.seconds)

    def _way(self, place: float) -> float:
        right = bisect_right(self.course, place, key=itemgetter(0))
        (start, low), (end, high) = self.course[right - 1], self.course[right]
        return low + (high - low) * (place - start) / (end - start)


def arrivals(day: Day, mix: Mix, seed: int) -> Workload:
    """Every request of the day, as a Poisson process with that rate (thinned from the peak)."""
    draw = random.Random(seed)
    found: list[Request] = []
    now = 0.0
    while True:
        now += draw.expovariate(day.peak_rps)
        if now >= day.seconds:
            return Workload(mix.name, tuple(found))
        if draw.random() * day.peak_rps < day.rate(now):
            found.append(replace(draw.choice(mix.requests), index=len(found), arrival_s=now))


class Period(NamedTuple):
    """What arrived in one period: its sums, and the prefill work of each second."""

    demand: Demand
    work_s: tuple[float, ...]


def periods(day: Day, mix: Mix, seconds: int, seed: int) -> Iterator[Period]:
    """The day in periods of whole seconds, drawn without keeping single requests."""
    draw = random.Random(seed)
    for start in range(0, int(day.seconds), seconds):
        counts = [_poisson(draw, day.rate(second + 0.5)) for second in range(start, start + seconds)]
        drawn = draw.choices(mix.shapes, k=sum(counts))
        work, first = [], 0
        for count in counts:
            work.append(sum([shape.work_s for shape in drawn[first : first + count]]))
            first += count
        yield Period(sums(drawn, float(seconds)), tuple(work))


def sums(drawn: Sequence[Shape], seconds: float) -> Demand:
    """What routers would have counted of these requests, the ends aside."""
    prompts = [shape.prompt for shape in drawn]
    uncached = [shape.uncached for shape in drawn]
    able = [shape for shape in drawn if shape.attainable]
    return Demand(
        seconds=seconds,
        requests=len(drawn),
        prompt_tokens=sum(prompts),
        prompt_squares=sum([n * n for n in prompts]),
        uncached_tokens=sum(uncached),
        uncached_squares=sum([n * n for n in uncached]),
        attended=sum([shape.uncached * (shape.prompt - shape.uncached / 2) for shape in drawn]),
        output_tokens=sum([shape.output for shape in drawn]),
        attainable=len(able),
        able=len(able),
        able_tokens=sum([shape.uncached for shape in able]),
        able_squares=sum([shape.uncached**2 for shape in able]),
        able_attended=sum([shape.uncached * (shape.prompt - shape.uncached / 2) for shape in able]),
    )


def _poisson(draw: random.Random, mean: float) -> int:
    """Knuth's method below 30, a rounded normal above."""
    if mean > 30:
        return max(round(draw.gauss(mean, sqrt(mean))), 0)
    limit, count, product = exp(-mean), 0, draw.random()
    while product > limit:
        count += 1
        product *= draw.random()
    return count
