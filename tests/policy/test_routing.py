"""Routing: eligibility, local or remote, determinism, the baselines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lanewise.fleet import FleetSnapshot, Lane, Link, LinkState, Role, WorkerIdentity, WorkerStats, WorkerView
from lanewise.policy.baseline_routing import LengthBuckets
from lanewise.policy.profile import make_profile
from lanewise.policy.routing import ROUTE_NAMES, RouteRequest, choose_pair

COST = make_profile("qwen2.5-32b", "h200", 1).cost.to_mapping()


def worker(role: Role, name: str, fingerprint: str = "f", ready: bool = True, **stats: object) -> WorkerView:
    identity = WorkerIdentity(role, name, name, "", "", "m", fingerprint, {}, 32768, 100_000, 1, "d", 1)
    return WorkerView(identity, WorkerStats(cost=COST, **stats), ready)  # type: ignore[arg-type]


def fleet(*prefill: WorkerView, decode: tuple[WorkerView, ...] = ()) -> FleetSnapshot:
    return FleetSnapshot(prefill, decode or (worker(Role.DECODE, "d0"),))


def p(name: str, **stats: object) -> WorkerView:
    return worker(Role.PREFILL, name, **stats)  # type: ignore[arg-type]


ASK = RouteRequest(prompt_tokens=1000, disaggregation="Always")


def test_no_decode_worker_no_pair() -> None:
    assert choose_pair(ASK, FleetSnapshot((p("p0"),), ()), 0.0, 0) is None
    assert choose_pair(ASK, fleet(decode=(worker(Role.DECODE, "d", ready=False),)), 0.0, 0) is None


def test_prefers_the_idle_worker() -> None:
    pair = choose_pair(ASK, fleet(p("p0", queued_tokens=5000), p("p1")), 0.0, 0)
    assert pair is not None
    assert (pair.prefill, pair.decode) == ("p1", "d0")
    assert pair.predicted_ttft_s == pytest.approx(0.12, rel=0.2)


def test_a_model_with_long_fixed_times_does_not_count_them_for_each_token() -> None:
    """Fixed times longer than a usual batch: 20,000 tokens wait for some large batches, not for 20,000 small ones."""
    slow = {**COST, "launch_s": 0.05, "weights_s": 1e-4}
    view = WorkerView(p("p0").identity, WorkerStats(cost=slow, queued_tokens=20_000), True)
    pair = choose_pair(ASK, fleet(view), 0.0, 0)
    assert pair is not None
    assert pair.predicted_ttft_s < 3 * 21_000 * slow["compute_s"]


def test_a_cached_prefix_outweighs_a_short_queue() -> None:
    ask = replace(ASK, prompt_tokens=4000, cached_tokens={"p0": 3900})
    pair = choose_pair(ask, fleet(p("p0", queued_tokens=500), p("p1")), 0.0, 0)
    assert pair is not None
    assert pair.prefill == "p0"


@pytest.mark.parametrize(
    "bad",
    [
        p("p0", fingerprint="other"),
        p("p0", ready=False),
        p("p0", draining=True),
        p("p0", links=(Link("d0", LinkState.FAILED),)),
    ],
    ids=["fingerprint", "not ready", "draining", "failed link"],
)
def test_ineligible_prefill_workers_leave_local_prefill(bad: WorkerView) -> None:
    pair = choose_pair(ASK, fleet(bad), 0.0, 0)
    assert pair is not None
    assert (pair.prefill, pair.decode) == (None, "d0")


def test_excluded_and_too_long() -> None:
    both = fleet(p("p0"), p("p1"))
    pair = choose_pair(replace(ASK, exclude=frozenset({"p0"})), both, 0.0, 0)
    assert pair is not None
    assert pair.prefill == "p1"
    assert choose_pair(replace(ASK, exclude=frozenset({"d0"})), both, 0.0, 0) is None
    assert choose_pair(replace(ASK, prompt_tokens=40_000), both, 0.0, 0) is None


def test_never_is_local_and_auto_weighs() -> None:
    busy = (worker(Role.DECODE, "d0", running_requests=40, running_context_tokens=40_000),)
    idle = fleet(p("p0"), decode=busy)
    assert choose_pair(replace(ASK, disaggregation="Never"), idle, 0.0, 0).prefill is None  # type: ignore[union-attr]
    auto = replace(ASK, disaggregation="Auto", max_tokens=10)
    assert choose_pair(auto, idle, 0.0, 0).prefill == "p0"  # type: ignore[union-attr]
    queue = fleet(p("p0", queued_tokens=200_000))
    assert choose_pair(auto, queue, 0.0, 0).prefill is None  # type: ignore[union-attr]


def test_decode_with_room_is_chosen() -> None:
    full = worker(Role.DECODE, "d0", kv_used_tokens=99_000, kv_capacity_tokens=100_000)
    pair = choose_pair(ASK, fleet(p("p0"), decode=(full, worker(Role.DECODE, "d1"))), 0.0, 0)
    assert pair is not None
    assert pair.decode == "d1"


def test_pairs_only_within_a_fingerprint() -> None:
    """During a rollout: the busy decode worker of the right fingerprint wins over the idle one of the wrong."""
    old = worker(Role.DECODE, "d-old", fingerprint="old", running_requests=50, running_context_tokens=50_000)
    new = worker(Role.DECODE, "d-new", fingerprint="new")
    pair = choose_pair(ASK, fleet(p("p0", fingerprint="old"), decode=(new, old)), 0.0, 0)
    assert pair is not None
    assert (pair.prefill, pair.decode) == ("p0", "d-old")


def test_lanes_are_honoured_while_they_exist() -> None:
    views = (p("p0", lane=Lane.SHORT), p("p1", lane=Lane.LONG, queued_tokens=9000))
    pair = choose_pair(replace(ASK, lane=Lane.LONG), fleet(*views), 0.0, 0)
    assert pair is not None
    assert pair.prefill == "p1"
    pair = choose_pair(replace(ASK, lane=Lane.LONG), fleet(views[0]), 0.0, 0)
    assert pair is not None
    assert pair.prefill == "p0"


@pytest.mark.parametrize("policy", ROUTE_NAMES)
def test_every_rule_is_deterministic_and_uses_every_worker(policy: str) -> None:
    views = fleet(*(p(f"p{i}", kv_cached_tokens=0) for i in range(4)))
    ask = replace(ASK, length_cuts=(100, 500, 2000))
    first = [choose_pair(ask, views, 0.0, seed, policy) for seed in range(64)]
    assert first == [choose_pair(ask, views, 0.0, seed, policy) for seed in range(64)]
    used = {pair.prefill for pair in first if pair is not None}
    assert used == ({"p2"} if policy == "buckets" else {"p0", "p1", "p2", "p3"})


def test_sampling_spreads_over_a_large_fleet() -> None:
    views = fleet(*(p(f"p{i:02d}") for i in range(40)))
    ask = replace(ASK, sampled=True)
    used = {choose_pair(ask, views, 0.0, seed).prefill for seed in range(400)}  # type: ignore[union-attr]
    assert len(used) > 30


def test_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="unknown routing policy 'best'"):
        choose_pair(ASK, fleet(p("p0")), 0.0, 0, "best")


def test_buckets_are_cut_to_equal_work_every_five_seconds() -> None:
    buckets = LengthBuckets()
    for i in range(100):
        cuts = buckets.observe(10 if i % 2 else 1000, 2, i * 0.01)
    assert cuts == (1000,)
    for i in range(100):
        cuts = buckets.observe(10, 2, 6 + i)
    assert cuts == (1000,)  # the long ones still make half of the work


SLOW_COST = {name: value * 30 if name.endswith("_s") else value for name, value in COST.items()}


def d(name: str, cost: dict[str, float] = COST, **stats: object) -> WorkerView:
    """A decode worker that says of itself how fast it is."""
    view = worker(Role.DECODE, name, **stats)  # type: ignore[arg-type]
    return replace(view, stats=replace(view.stats, cost=cost))


def test_an_idle_decode_worker_is_taken_for_as_fast_as_its_like() -> None:
    """It says of itself that it is too slow; were that believed, nothing would ever show that it is wrong."""
    ask = replace(ASK, tpot_target_s=0.05, max_tokens=400)
    busy = d("busy", running_requests=8, running_context_tokens=8000, decode_step_s=0.02)
    for idle in (d("idle", SLOW_COST), d("idle", SLOW_COST, decode_step_s=1.0)):
        pair = choose_pair(ask, fleet(p("p0"), decode=(busy, idle)), 0.0, 0)
        assert pair is not None
        assert pair.decode == "idle"
    working = d("slow", SLOW_COST, running_requests=1, running_context_tokens=1000, decode_step_s=1.0)
    pair = choose_pair(ask, fleet(p("p0"), decode=(busy, working)), 0.0, 0)
    assert pair is not None
    assert pair.decode == "busy", "what it measures counts"
    other = replace(idle, identity=replace(idle.identity, device="slower"))
    pair = choose_pair(ask, fleet(p("p0"), decode=(busy, other)), 0.0, 0)
    assert pair is not None
    assert pair.decode == "busy", "another device is another matter"


@pytest.mark.parametrize("batches", [(50, 0, 0), (50, 50, 50), (0, 0, 0)])
def test_a_crowd_that_comes_at_once_spreads_over_decode_workers_of_one_device(batches: tuple[int, ...]) -> None:
    """However their cost models differ: nothing runs anywhere when it comes, so nothing measured tells them apart."""
    ask = replace(ASK, tpot_target_s=0.05, max_tokens=400)
    slower = {name: value * 1.3 if name.endswith("_s") else value for name, value in COST.items()}
    costs = (COST, slower, SLOW_COST)
    views = [d(f"d{i}", cost, cost_batches=count) for i, (cost, count) in enumerate(zip(costs, batches, strict=True))]
    for _ in range(15):
        pair = choose_pair(ask, fleet(p("p0"), decode=tuple(views)), 0.0, 0)
        assert pair is not None
        index = int(pair.decode[1:])
        views[index] = replace(
            views[index],
            inflight_requests=views[index].inflight_requests + 1,
            inflight_tokens=views[index].inflight_tokens + ask.prompt_tokens,
        )
    assert [view.inflight_requests for view in views] == [5, 5, 5]


def test_what_an_idle_decode_worker_measured_long_ago_does_not_count_as_its_load() -> None:
    busy = d("busy", running_requests=8, running_context_tokens=8000, decode_step_s=0.02)
    idle = d("idle", decode_step_s=3.0)
    pair = choose_pair(ASK, fleet(p("p0"), decode=(busy, idle)), 0.0, 0)
    assert pair is not None
    assert pair.decode == "idle"
