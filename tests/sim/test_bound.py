"""The certificates: against brute force, and never beaten by any policy."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.policy.batching import POLICY_NAMES
from lanewise.policy.profile import make_profile
from lanewise.sim.bound import bound, most_on_time, srpt_mean
from lanewise.sim.cluster import SimConfig, simulate
from lanewise.sim.workload import Request, Workload

PROFILE = make_profile("qwen2.5-32b", "h200", 1)

jobs = st.lists(st.tuples(st.floats(0, 0.5), st.floats(0.01, 1)), min_size=1, max_size=8)


def _feasible(chosen: tuple[int, ...], release: list[float], work: list[float], deadline: float) -> bool:
    end = 0.0
    for index in chosen:  # agreeable deadlines: order of release is earliest deadline first
        end = max(end, release[index]) + work[index]
        if end > release[index] + deadline:
            return False
    return True


@given(jobs, st.floats(0.2, 2))
@settings(deadline=None, max_examples=300)
def test_most_on_time_is_exact(rows: list[tuple[float, float]], deadline: float) -> None:
    release, now = [], 0.0
    for gap, _ in rows:
        now += gap
        release.append(now)
    work = [min(seconds, deadline) for _, seconds in rows]
    order = range(len(rows))
    best = max(
        n for n in range(len(rows) + 1) if any(_feasible(c, release, work, deadline) for c in combinations(order, n))
    )
    assert most_on_time(release, work, deadline) == best


def test_srpt_by_hand() -> None:
    assert srpt_mean([0.0, 1.0, 10.0], [3.0, 1.0, 2.0]) == pytest.approx((4 + 1 + 2) / 3)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@given(st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 6000)), min_size=1, max_size=20), st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_no_policy_beats_the_bound(policy: str, rows: list[tuple[float, int]], instances: int) -> None:
    now, requests = 0.0, []
    for index, (gap, tokens) in enumerate(rows):
        now += gap
        requests.append(Request(index, now, tokens))
    workload = Workload("w", tuple(requests))
    config = SimConfig((PROFILE,) * instances, (PROFILE,), policy=policy, max_batch_tokens=2048)
    times = [track.ttft_s for track in simulate(config, workload).tracks]
    limit = bound(requests, [0] * len(requests), PROFILE.cost, instances, 0.4)
    assert sum(t for t in times if t is not None) / len(times) >= limit.mean_ttft_s - 1e-9
    assert sum(t is not None and t <= 0.4 for t in times) <= round(limit.attainment * len(times))


def test_cached_tokens_raise_the_bound() -> None:
    requests = [Request(i, i * 0.2, 3000, ideal_hit_tokens=2900) for i in range(50)]
    cold = bound(requests, [0] * 50, PROFILE.cost, 1, 0.4)
    warm = bound(requests, [r.ideal_hit_tokens for r in requests], PROFILE.cost, 1, 0.4)
    assert warm.attainment == 1.0
    assert warm.mean_ttft_s < cold.mean_ttft_s
    assert bound([replace(r, prompt_tokens=90000) for r in requests], [0] * 50, PROFILE.cost, 1, 0.4).attainment == 0.0
