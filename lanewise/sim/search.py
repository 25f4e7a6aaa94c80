"""Searching clusters: the cheapest that holds an SLO, and the most load a cluster of a given cost or power holds.

Owns: the candidates and the order in which they are tried. Must not: parse arguments or print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lanewise.policy.profile import Profile
from lanewise.sim.cluster import SimConfig, simulate
from lanewise.sim.report import summarise
from lanewise.sim.workload import Workload, scale_rate

MIXED_POLICY = "fcfs-512"  # decode-first chunked prefill with a 512-token budget
RATE_STEPS = 7  # halvings of the load interval


@dataclass(frozen=True, slots=True)
class Goal:
    """What a cluster must hold."""

    ttft_s: float
    tpot_s: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cluster: split when it has prefill instances, else mixed."""

    prefill: tuple[Profile, ...]
    decode: tuple[Profile, ...]

    @property
    def name(self) -> str:
        if not self.prefill:
            return f"mixed {len(self.decode)} × {self.decode[0].name}"
        return f"split {len(self.prefill)} × {self.prefill[0].name} : {len(self.decode)} × {self.decode[0].name}"

    @property
    def kind(self) -> str:
        return "split" if self.prefill else "mixed"

    @property
    def price_per_hour(self) -> float:
        return sum(profile.price_per_hour for profile in (*self.prefill, *self.decode))

    @property
    def watts(self) -> float:
        return sum(profile.watts for profile in (*self.prefill, *self.decode))

    @property
    def gpus(self) -> int:
        return sum(profile.gpus for profile in (*self.prefill, *self.decode))


@dataclass(frozen=True, slots=True)
class Searcher:
    """One workload, one goal; `on_run` is called after each simulation."""

    workload: Workload
    goal: Goal
    base: SimConfig
    on_run: Callable[[str], None]

    def measure(self, candidate: Candidate, scale: float = 1.0) -> dict[str, Any]:
        """The summary of one run."""
        config = replace(
            self.base,
            prefill=candidate.prefill,
            decode=candidate.decode,
            policy=self.base.policy if candidate.prefill else MIXED_POLICY,
            disaggregation="Always" if candidate.prefill else "Never",
            ttft_target_s=self.goal.ttft_s,
            tpot_target_s=self.goal.tpot_s,
        )
        outcome = simulate(config, scale_rate(self.workload, scale))
        self.on_run(candidate.name)
        return summarise(outcome, self.goal.ttft_s, self.goal.tpot_s, None)

    def holds(self, candidate: Candidate, scale: float = 1.0) -> bool:
        return bool(self.measure(candidate, scale)["slo_attainment"] >= self.goal.attainment)

    def least(self, make: Callable[[int], Candidate], most: int) -> int | None:
        """The least count that holds, by doubling and halving; None: not even `most`."""
        low, high = 0, 1
        while high < most and not self.holds(make(high)):
            low, high = high, min(2 * high, most)
        if high == most and not self.holds(make(high)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(make(middle)) else (middle, high)
        return high

    def cheapest_split(self, prefill: Profile, decode: Profile, most: int) -> Candidate | None:
        """Fewest prefill instances with decode to spare, then fewest decode instances behind them."""

        def split(prompts: int, tokens: int) -> Candidate:
            return Candidate((prefill,) * prompts, (decode,) * tokens)

        prompts = self.least(lambda count: split(count, most), most)
        if prompts is None:
            return None
        tokens = self.least(lambda count: split(prompts, count), most)
        return None if tokens is None else split(prompts, tokens)

    def cheapest_mixed(self, profile: Profile, most: int) -> Candidate | None:
        count = self.least(lambda n: Candidate((), (profile,) * n), most)
        return None if count is None else Candidate((), (profile,) * count)

    def most_load(self, candidate: Candidate, ceiling: float) -> float:
        """The highest rate factor at which the candidate holds the goal, 0 when it never does."""
        low, high = 0.0, ceiling
        for _ in range(RATE_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.holds(candidate, middle) else (low, middle)
        return low


def splits_within(
    prefill: Profile, decode: Profile, budget: float, measure: Callable[[Candidate], float], work_ratio: float
) -> list[Candidate]:
    """Splits that use up a budget of cost or power, nearest to the ratio of prefill to decode work first."""
    one_prefill = measure(Candidate((prefill,), ()))
    one_decode = measure(Candidate((), (decode,)))
    found = []
    prompts = 1
    while prompts * one_prefill + one_decode <= budget * 1.0001:
        tokens = int((budget * 1.0001 - prompts * one_prefill) // one_decode)
        found.append(Candidate((prefill,) * prompts, (decode,) * tokens))
        prompts += 1
    return sorted(found, key=lambda c: abs(len(c.prefill) / (len(c.prefill) + len(c.decode)) - work_ratio))


def prefill_share(workload: Workload, prefill: Profile, decode: Profile, batch: int = 64) -> float:
    """Prefill's part of all GPU time, were decode to run in batches of `batch`: where to start the search."""
    prompts = sum(prefill.cost.work(r.prompt_tokens, 0) * prefill.gpus for r in workload.requests)
    mean_context = sum(r.prompt_tokens + r.output_tokens / 2 for r in workload.requests) / len(workload.requests)
    step = decode.cost.decode(batch, int(batch * mean_context)) / batch
    tokens = sum(step * r.output_tokens * decode.gpus for r in workload.requests)
    return prompts / (prompts + tokens)


def best_at_budget(
    searcher: Searcher, candidates: Sequence[Candidate], ceiling: float, tried: int
) -> tuple[Candidate, float] | None:
    """The candidate that holds most load among the first `tried`."""
    best: tuple[Candidate, float] | None = None
    for candidate in candidates[:tried]:
        load = searcher.most_load(candidate, ceiling)
        if best is None or load > best[1]:
            best = (candidate, load)
    return best
