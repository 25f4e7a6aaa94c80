"""The simulated day: the interval model against the event simulator, schedules, draining, zero, the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from lanewise.errors import ConfigError
from lanewise.policy.profile import make_profile
from lanewise.policy.scaling_types import Rules
from lanewise.sim.cli import main
from lanewise.sim.cluster import SimConfig
from lanewise.sim.report import summarise
from lanewise.sim.scaling_cluster import ScaledService, no_floors, simulate_scaled
from lanewise.sim.scaling_controllers import SYNC_S, HpaUtilisation, KedaQueue, Measured, Policy, Schedule, Threshold
from lanewise.sim.scaling_day import Day, Mix, arrivals, mix_of, periods
from lanewise.sim.scaling_interval import World, run, turns
from lanewise.sim.scaling_pooled import PooledCluster, PooledService, pool_of, read_pools
from lanewise.sim.scaling_response import INSTANT, Response, prefill_cell
from lanewise.sim.workload import Request, Workload, read_trace

ROOT = Path(__file__).parent.parent.parent
PROFILE = make_profile("qwen2.5-32b", "h200", 1, compute_efficiency=0.55)
TTFT_S, TPOT_S, START_S = 1.0, 0.05, 60.0
RULES = Rules(1, 6, 1, 6, TTFT_S, TPOT_S, max_ratio_percent=1000)
HOUR = 3600.0


def mix() -> Mix:
    return mix_of(read_trace(ROOT / "tests/data/traces/azure_llm_2023_conv_600.csv"), PROFILE.cost, TTFT_S, False)


def response() -> Response:
    data = json.loads((ROOT / "benchmarks/data/scaling_response.json").read_text(encoding="utf-8"))
    return Response.from_mapping(data["azure conv"])


def config(count: int = 6) -> SimConfig:
    workers = (PROFILE,) * count
    return SimConfig(workers, workers, ttft_target_s=TTFT_S, tpot_target_s=TPOT_S, max_batch_tokens=8192)


def observed(prefill: int = 1, decode: int = 1, **changes: float) -> Measured:
    return replace(Measured(0.0, prefill, decode, prefill, decode, 0.5, 0.0, 1.0, 10.0, 0.3), **changes)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_interval_model_agrees_with_the_event_simulator(fixed: bool) -> None:
    """The same rise and fall of load, the same controller, request by request and by intervals."""
    day = Day(11.0, 11.0 / 4, seconds=1.0 * HOUR)
    world = World.make(day, mix(), response(), PROFILE, TTFT_S, TPOT_S, START_S, seed=3)
    steps = [(0.0, 1, 1), (1200.0, 2, 1), (3000.0, 1, 1)]

    def controller() -> Schedule | Policy:
        return Schedule(steps, START_S) if fixed else Policy(RULES)

    quick = run(world, controller(), (2, 1))
    service = ScaledService(config(), (2, 1), START_S)
    outcome, scaled = simulate_scaled(service, arrivals(day, mix(), 3), controller())
    share = summarise(outcome, TTFT_S, TPOT_S, None)["slo_attainment"]
    assert quick.attained == pytest.approx(share, abs=0.015)
    assert quick.gpu_hours == pytest.approx(scaled.gpu_hours, rel=0.02 if fixed else 0.12)


def test_a_queue_for_decode_is_as_long_by_intervals_as_request_by_request() -> None:
    """A load that one decode worker cannot hold for a while: what waits is late, and until it is worked off."""
    full = mix_of(read_trace(ROOT / "benchmarks/data/azure_llm_2023_conv.csv.gz"), PROFILE.cost, TTFT_S, False)
    peak = 1.15 * response().full_rate
    day = Day(peak, peak / 2, seconds=600.0)
    world = World.make(day, full, response(), PROFILE, TTFT_S, TPOT_S, START_S, seed=1)
    steps = [(0.0, 6, 1)]
    quick = run(world, Schedule(steps, START_S), (6, 1))
    service = ScaledService(config(), (6, 1), START_S)
    outcome, _ = simulate_scaled(service, arrivals(day, full, 1), Schedule(steps, START_S))
    share = summarise(outcome, TTFT_S, TPOT_S, None)["slo_attainment"]
    assert share < 0.6, "decode is too small here"
    assert quick.attained == pytest.approx(share, abs=0.1)


def test_a_prefill_that_takes_no_time_takes_none() -> None:
    """Behind it decode is measured; a prefill that took time would keep the load from decode."""
    assert INSTANT.alone(130_000) < 1e-6


def test_a_cell_of_the_response_table_is_what_the_event_simulator_gives() -> None:
    full = mix_of(read_trace(ROOT / "benchmarks/data/azure_llm_2023_conv.csv.gz"), PROFILE.cost, TTFT_S, False)
    share, kept = prefill_cell(full, PROFILE, TTFT_S, "none", 2, 0.8, seed=9)
    table = response()
    assert share == pytest.approx(table.attained.at(2, 0.8), abs=0.01)
    assert kept == pytest.approx(table.kept.at(2, 0.8), abs=0.01)


def test_every_request_ends_once_while_workers_come_and_go() -> None:
    day = Day(9.0, 9.0, seconds=600.0)
    workload = arrivals(day, mix(), 1)
    steps = [(0.0, 2, 2), (120.0, 1, 1), (240.0, 3, 2), (360.0, 1, 1), (480.0, 2, 1)]
    outcome, scaled = simulate_scaled(ScaledService(config(), (2, 2), 5.0), workload, Schedule(steps, 5.0))
    assert len(outcome.tracks) == len(workload.requests)
    assert all(track.end_s is not None and track.ttft_s is not None for track in outcome.tracks)
    assert [move[1:3] for move in scaled.moves] == [(2, 2), (1, 1), (3, 2), (1, 1), (2, 1)]
    busy = (4 * 120 + 2 * 120 + 5 * 120 + 2 * 120 + 3 * 120) / HOUR
    assert busy <= scaled.gpu_hours <= 1.15 * busy + 0.1  # starting and draining workers count


def test_a_fleet_that_sheds_grows_as_one_that_does_not() -> None:
    """Twelve times the load from one moment to the next: what the router sends away is asked for all the same."""
    calm, rush = arrivals(Day(1.0, 1.0, seconds=600.0), mix(), 2), arrivals(Day(12.0, 12.0, seconds=600.0), mix(), 3)
    late = (
        replace(one, index=len(calm.requests) + i, arrival_s=600.0 + one.arrival_s)
        for i, one in enumerate(rush.requests)
    )
    workload = Workload("step", (*calm.requests, *late))
    found = []
    for most_wait in (None, 2.0):
        service = ScaledService(replace(config(), max_queue_wait_s=most_wait), (1, 1), START_S)
        outcome, scaled = simulate_scaled(service, workload, Policy(RULES))
        assert all(track.end_s is not None for track in outcome.tracks)
        assert bool(outcome.shed) == (most_wait is not None)
        found.append(next((at for at, prefill, _, _ in scaled.moves if prefill >= 3), inf))
    whole, shed = found
    assert shed <= whole + 2 * SYNC_S, "an overload is seen as soon, whoever is sent away"


def test_at_zero_requests_are_held_until_a_worker_is_up() -> None:
    requests = tuple(Request(i, 300.0 + i, 500, 20) for i in range(5))
    rules = replace(RULES, zero_after_s=60.0)
    outcome, scaled = simulate_scaled(ScaledService(config(), (1, 1), 20.0), Workload("w", requests), Policy(rules))
    assert (0, 0) in [move[1:3] for move in scaled.moves]
    waits = [track.ttft_s for track in outcome.tracks]
    assert all(wait is not None and 0 < wait < 60 for wait in waits)
    assert scaled.gpu_hours < 2 * 300 / HOUR


def test_days_are_seeded_and_swing_as_asked() -> None:
    day = Day(40.0, 10.0)
    assert day.rate(4 * HOUR) == pytest.approx(10.0)
    assert day.rate(16 * HOUR) == pytest.approx(40.0)
    steps = Day(40.0, 10.0, course=((0.0, 0.0), (0.25, 1.0), (0.5, 1.0), (1.0, 0.0)))
    assert [steps.rate(hour * HOUR) for hour in (0, 3, 6, 9, 18, 24)] == pytest.approx([10, 25, 40, 40, 25, 10])
    short = Day(20.0, 20.0, seconds=900.0)
    first, again, other = (list(periods(short, mix(), 15, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sum(p.demand.requests for p in first) == pytest.approx(20 * 900, rel=0.05)
    assert sum(map(sum, (p.work_s for p in first))) == pytest.approx(20 * 900 * mix().work_s, rel=0.05)
    assert arrivals(short, mix(), 1) == arrivals(short, mix(), 1)


def test_turns_count_changes_of_direction() -> None:
    assert turns([1, 2, 3, 3, 2, 1]) == 1
    assert turns([1, 2, 1, 2]) == 2
    assert turns([3, 3, 3]) == 0


def test_the_rules_of_others() -> None:
    nothing = None
    hpa = HpaUtilisation(0.7, 0.7, (8, 8))
    assert hpa.counts(observed(2, 1, prefill_busy=0.95), lambda: nothing) == (3, 1)  # type: ignore[arg-type, return-value]
    keda = KedaQueue(2.0, 20.0, (8, 8))
    assert keda.counts(observed(1, 1, prefill_outstanding=5, decode_running=50), lambda: nothing) == (3, 3)  # type: ignore[arg-type, return-value]
    rule = Threshold(0.8, 5.0, 0.5, (8, 8), 60.0)
    busy = observed(1, 1, prefill_waiting=6, decode_kv=0.9)
    assert rule.counts(busy, lambda: nothing) == (2, 2)  # type: ignore[arg-type, return-value]
    assert rule.counts(replace(busy, at_s=15.0), lambda: nothing) == (1, 1)  # type: ignore[arg-type, return-value]


def test_the_command_prints_gpu_hours_attainment_and_every_move(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "apiVersion: lanewise.io/v1alpha1\nkind: ScalingPolicy\nmetadata: {name: chat}\n"
        "spec:\n  targetRef: {name: chat}\n  prefill: {min: 1, max: 4}\n  decode: {min: 1, max: 4}\n"
        '  schedules: [{cron: "1 0 * * *", duration: 5m, decode: {min: 2}}]\n'
    )
    service = str(ROOT / "deploy/samples/sim-h200-qwen2.5-32b.yaml")
    trace = str(ROOT / "tests/data/traces/azure_llm_2023_conv_600.csv")
    assert main([service, "--trace", trace, "--scaling", str(policy), "--json", "-", "--rate-scale", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 600
    assert found["gpu_hours"] > 0
    assert 0 < found["slo_attainment"] <= 1
    assert any(move["decode"] == 2 and '"1 0 * * *"' in move["reason"] for move in found["moves"])
    assert main([service, "--trace", trace, "--scaling", service]) == 2


POOLS = """
pools:
  - name: big
    profile: {model: qwen2.5-32b, device: h200, tensorParallel: 1, overrides: {compute_efficiency: 0.55}}
    most: 2
  - name: cheap
    profile: {model: qwen2.5-32b, device: a100, tensorParallel: 2, price_per_hour: 3.0}
    most: 5
"""


def test_pools_serve_by_the_cheapest_mix_and_spill_into_the_other(tmp_path: Path) -> None:
    path = tmp_path / "pools.yaml"
    path.write_text(POOLS)
    pools = read_pools(path, PROFILE)
    day = Day(14.0, 3.5, seconds=1200.0)
    workload = arrivals(day, mix(), 5)
    service = PooledService(config(), PROFILE, pools, (1, 1), START_S, no_floors, gpus=12)
    cluster = PooledCluster(service, workload, Policy(replace(RULES, down_stabilization_s=60.0)))
    outcome = cluster.run()
    assert all(track.end_s is not None for track in outcome.tracks)
    assert "cheap" in cluster.moves[0][3]
    assert "big" not in cluster.moves[0][3]
    assert any("×big" in move[3] for move in cluster.moves), "more than the cheap pool holds"
    assert summarise(outcome, TTFT_S, TPOT_S, None)["slo_attainment"] > 0.9
    many = (pool_of("big", pools[0][1], 6), pools[0][1])
    dear = PooledService(config(), PROFILE, (many,), (1, 1), START_S, no_floors)
    alone = PooledCluster(dear, workload, Policy(RULES))
    alone.run()
    assert cluster.price < alone.price


def test_pools_are_a_matter_of_the_simulator_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = str(ROOT / "deploy/samples/sim-h200-qwen2.5-32b.yaml")
    trace = str(ROOT / "tests/data/traces/azure_llm_2023_conv_600.csv")
    pools = str(ROOT / "deploy/samples/sim/pools.yaml")
    assert main([service, "--trace", trace, "--pools", pools]) == 2
    assert "--scaling" in capsys.readouterr().err
    policy = tmp_path / "policy.yaml"
    text = (
        "apiVersion: lanewise.io/v1alpha1\nkind: ScalingPolicy\nmetadata: {name: chat}\n"
        "spec:\n  targetRef: {name: chat}\n  prefill: {min: 1, max: 4}\n  decode: {min: 1, max: 4}\n"
    )
    policy.write_text(text)
    arguments = [service, "--trace", trace, "--scaling", str(policy), "--json", "-", "--rate-scale", "3"]
    assert main([*arguments, "--pools", pools]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["price"] > 0
    assert found["moves"][0]["reason"].startswith("prefill 1×")
    policy.write_text(text + "  pools: [{name: h200, most: 4}]\n")
    assert main(arguments) == 2, "no field of the resource: an API server refuses it by name as well"
    assert "spec.pools" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pools: []", "'pools'"),
        ("pools: [{name: a, most: 0, profile: {model: qwen2.5-32b, device: h200}}]", "pools[0].most"),
        ("pools: [{name: a, most: 1}]", "pools[0]"),
        ("pools: [{name: a, most: 1, profile: {model: qwen2.5-7b, device: h200}}]", "service's model"),
        (POOLS + "  - {name: big, most: 1, profile: {model: qwen2.5-32b, device: h200}}", "name of its own"),
    ],
)
def test_a_file_of_pools_that_is_wrong_says_where(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "pools.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_pools(path, PROFILE)
