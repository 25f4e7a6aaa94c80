"""The simulated service: times by hand, decode, transfer, caches, closed loops, seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.policy.lanes import LANE_CONTROLLERS
from lanewise.policy.profile import make_profile
from lanewise.policy.routing import ROUTE_NAMES
from lanewise.sim.cluster import Outcome, SimConfig, simulate
from lanewise.sim.report import summarise, tpot_s
from lanewise.sim.workload import (
    Request,
    Workload,
    closed_loop,
    from_lengths,
    jitter,
    one_token,
    poisson,
    read_trace,
    scale_rate,
    select,
)

TRACES = Path(__file__).parent.parent / "data" / "traces"
PROFILE = make_profile("qwen2.5-32b", "h200", 1)
COST = PROFILE.cost
BASE = SimConfig((PROFILE,), (PROFILE,), policy="fcfs-8192")


def run(*rows: tuple[float, int, int], **changes: object) -> Outcome:
    requests = tuple(Request(i, *row) for i, row in enumerate(rows))
    return simulate(replace(BASE, **changes), Workload("w", requests))  # type: ignore[arg-type]


def test_ttft_is_arrival_to_the_end_of_the_last_batch() -> None:
    first, second = run((0.0, 1000, 1), (0.05, 300, 1)).tracks
    alone = COST.alone(1000)
    assert first.ttft_s == pytest.approx(alone)
    assert second.ttft_s == pytest.approx(alone + COST.alone(300) - 0.05)


def test_arrivals_of_one_instant_share_the_first_batch() -> None:
    tracks = run((0.0, 100, 1), (0.0, 200, 1)).tracks
    both = COST.prefill([(100, 0, True), (200, 0, True)])
    assert [track.ttft_s for track in tracks] == pytest.approx([both, both])


def test_a_lone_request_decodes_after_its_transfer() -> None:
    (track,) = run((0.0, 1000, 5)).tracks
    link = 1000 * PROFILE.kv_bytes_per_token * 8 / (PROFILE.kv_link_gbps * 1e9) + PROFILE.kv_link_latency_us * 1e-6
    steps = sum(COST.decode(1, 1001 + i) for i in range(4))
    assert track.end_s == pytest.approx(COST.alone(1000) + link + steps, rel=1e-3)
    assert tpot_s(track) == pytest.approx((link + steps) / 4, rel=1e-3)


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 3000), st.integers(1, 200)), min_size=1, max_size=12))
@settings(deadline=None, max_examples=30)
def test_every_request_ends_once_and_in_order(rows: list[tuple[float, int, int]]) -> None:
    for mode in ("Always", "Never"):
        outcome = run(*sorted(rows), disaggregation=mode)
        assert len(outcome.tracks) == len(rows)
        for track in outcome.tracks:
            assert track.ttft_s is not None
            assert track.ttft_s > 0
            assert track.end_s is not None
            assert track.end_s >= track.arrival_s + track.ttft_s - 1e-9
            assert track.received == track.request.output_tokens


def test_fast_forward_equals_stepping() -> None:
    """A second request admitted in the middle of a run of steps joins at the next border."""
    long, late = run((0.0, 100, 400), (3.0, 100, 2)).tracks
    assert long.end_s is not None
    assert late.end_s is not None
    begun = long.link_end_s + PROFILE.kv_link_latency_us * 1e-6
    at, context, steps = begun, 101, 0
    ready = late.link_end_s + PROFILE.kv_link_latency_us * 1e-6
    while at < ready:
        at += COST.decode(1, context)
        context, steps = context + 1, steps + 1
    at += COST.decode(2, context + 101)
    assert late.end_s == pytest.approx(at, rel=1e-6)
    context += 1
    for _ in range(399 - steps - 1):
        at += COST.decode(1, context)
        context += 1
    assert long.end_s == pytest.approx(at, rel=1e-6)


def test_a_small_pool_preempts_and_still_finishes() -> None:
    small = replace(PROFILE, kv_capacity_tokens=2500)
    outcome = run(*((0.01 * i, 300, 400) for i in range(8)), decode=(small,))
    assert all(track.received == 400 for track in outcome.tracks)
    assert outcome.preemptions > 0


def test_shedding_counts_as_a_miss_and_as_infinite() -> None:
    outcome = run(*((0.0, 8000, 1) for _ in range(8)), max_queue_wait_s=2.0)
    assert outcome.shed > 0
    result = summarise(outcome, 0.4, None, None)
    assert result["ttft_ms"]["max"] is None
    assert result["slo_attainment"] <= 1 - outcome.shed / 8


def test_prefix_caches_cut_the_work() -> None:
    trace = one_token(select(read_trace(TRACES / "mooncake_conversation_400.csv"), limit=150))
    busy = {}
    for cache in ("none", "lru:200000", "lru:5000000", "ideal"):
        outcome = simulate(replace(BASE, cache=cache), trace)
        busy[cache] = sum(outcome.prefill_busy_s)
    assert busy["none"] > busy["lru:5000000"] >= busy["ideal"] * 0.999
    assert busy["none"] >= busy["lru:200000"] >= busy["lru:5000000"]


@pytest.mark.parametrize("routing", ROUTE_NAMES)
def test_every_routing_rule_balances(routing: str) -> None:
    trace = one_token(scale_rate(read_trace(TRACES / "azure_llm_2023_conv_600.csv"), 3.0))
    config = replace(BASE, prefill=(PROFILE,) * 4, policy="lanewise", routing=routing)
    outcome = simulate(config, trace)
    assert min(outcome.prefill_busy_s) > 0.2 * max(outcome.prefill_busy_s)
    again = simulate(config, trace)
    assert [track.ttft_s for track in again.tracks] == [track.ttft_s for track in outcome.tracks]


@pytest.mark.parametrize("lanes", LANE_CONTROLLERS)
def test_lane_controllers_run(lanes: str) -> None:
    trace = one_token(scale_rate(read_trace(TRACES / "azure_llm_2023_conv_600.csv"), 5.0))
    outcome = simulate(replace(BASE, prefill=(PROFILE,) * 4, policy="lanewise", lanes=lanes), trace)
    assert all(track.ttft_s is not None for track in outcome.tracks)
    assert outcome.lane_moves <= 20


def test_closed_loop_keeps_its_concurrency() -> None:
    workload = closed_loop(from_lengths("l", [100, 3000, 50, 20] * 30), 4)
    outcome = simulate(replace(BASE, policy="lanewise", max_batch_tokens=8192), workload)
    events = sorted(
        [(t.arrival_s, 1) for t in outcome.tracks] + [(t.arrival_s + (t.ttft_s or 0), -1) for t in outcome.tracks]
    )
    level = peak = 0
    for _, change in events:
        level += change
        peak = max(peak, level)
    assert peak == 4


def test_seeds_decide_the_draws() -> None:
    trace = read_trace(TRACES / "azure_llm_2023_conv_600.csv")
    assert jitter(trace, 3.0, 1) == jitter(trace, 3.0, 1) != jitter(trace, 3.0, 2)
    assert poisson(trace, 5.0, 1) == poisson(trace, 5.0, 1) != poisson(trace, 5.0, 2)
    span = poisson(trace, 5.0, 1).requests[-1].arrival_s
    assert 600 / 5 * 0.8 < span < 600 / 5 * 1.2


def test_lanewise_on_a_real_trace() -> None:
    """A regression guard with room: the first minutes of azure conv."""
    trace = one_token(scale_rate(read_trace(TRACES / "azure_llm_2023_conv_600.csv"), 0.65))
    share = {}
    for policy in ("lanewise", "fcfs-8192", "srpt-512"):
        outcome = simulate(replace(BASE, policy=policy, max_batch_tokens=8192), trace)
        share[policy] = summarise(outcome, 0.4, None, None)["slo_attainment"]
    assert share["lanewise"] >= share["srpt-512"] > share["fcfs-8192"]
