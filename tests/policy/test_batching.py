"""Properties of every batch policy: conservation, budget, determinism, no starvation, deadlines."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.policy.batching import POLICY_NAMES, BatchPlan, BatchPolicy, Job, make_batch_policy
from lanewise.policy.length_aware import LengthAware
from lanewise.policy.profile import make_profile

COST = make_profile("qwen2.5-32b", "h200", 1).cost
TARGET_S = 0.4
NAMES = (*POLICY_NAMES, "lanewise-512", "fcfs-64")

arrivals = st.lists(
    st.tuples(st.floats(0, 0.2), st.one_of(st.integers(1, 300), st.integers(1, 9000)), st.sampled_from((0, 512, 8192))),
    min_size=1,
    max_size=25,
)


@dataclass
class Run:
    """What a policy did with a list of (gap, tokens, cached)."""

    plans: list[BatchPlan] = field(default_factory=list)
    computed: dict[int, int] = field(default_factory=dict)
    end_s: dict[int, float] = field(default_factory=dict)
    holds: list[tuple[float, float, float]] = field(default_factory=list)  # (now, until, least slack end)


def _jobs(trace: list[tuple[float, int, int]]) -> list[Job]:
    now, jobs = 0.0, []
    for key, (gap, tokens, cached) in enumerate(trace):
        now += gap
        jobs.append(Job(key, now, tokens, cached, now + TARGET_S))
    return jobs


def _drive(policy: BatchPolicy, jobs: list[Job], stateless: bool = False) -> Run:
    """Serves all jobs in virtual time, by either of the two interfaces."""
    run, now, coming, here = Run(), 0.0, list(jobs), {}
    for _ in range(20_000):
        while coming and coming[0].arrival_s <= now:
            job = coming.pop(0)
            here[job.key] = job
            if not stateless:
                policy.add(job)
        if not here:
            if not coming:
                return run
            now = coming[0].arrival_s
            continue
        plan = policy.plan(tuple(here.values()), now) if stateless else policy.next_batch(now)
        run.plans.append(plan)
        if not plan.chunks:
            assert plan.wait_until_s is not None, "work waits and nothing is planned"
            assert plan.wait_until_s > now
            slack_end = min(j.ttft_deadline_s - COST.alone(j.remaining_tokens, j.context_tokens) for j in here.values())
            run.holds.append((now, plan.wait_until_s, slack_end))
            now = min([plan.wait_until_s, *[job.arrival_s for job in coming[:1]]])
            continue
        assert len({key for key, _ in plan.chunks}) == len(plan.chunks), "a job twice in one batch"
        work = [(n, here[k].context_tokens, n == here[k].remaining_tokens) for k, n in plan.chunks]
        duration = COST.prefill(work)
        now += duration
        for key, new in plan.chunks:
            job = here[key]
            assert 0 < new <= job.remaining_tokens
            run.computed[key] = run.computed.get(key, 0) + new
            left = job.remaining_tokens - new
            if left:
                here[key] = Job(key, job.arrival_s, left, job.context_tokens + new, job.ttft_deadline_s, True)
            else:
                del here[key]
                run.end_s[key] = now
            if not stateless:
                policy.progress(key, new)
        policy.observe(plan, now, duration)
    raise AssertionError("never done")


def _make(name: str, budget: int = 2048) -> BatchPolicy:
    return make_batch_policy(name, max_batch_tokens=budget, cost=COST)


@pytest.mark.parametrize("name", NAMES)
@given(trace=arrivals)
@settings(max_examples=25, deadline=None)
def test_every_token_is_computed_once_and_never_over_budget(name: str, trace: list[tuple[float, int, int]]) -> None:
    policy = _make(name)
    jobs = _jobs(trace)
    run = _drive(policy, jobs)
    assert run.computed == {job.key: job.remaining_tokens for job in jobs}
    assert not policy.jobs
    limit = policy.max_batch_tokens * (2 if name.startswith("laps") else 1)  # LAPS's long batch is twice as large
    assert all(plan.tokens <= limit for plan in run.plans)


@pytest.mark.parametrize("name", NAMES)
@given(trace=arrivals)
@settings(max_examples=10, deadline=None)
def test_equal_input_gives_equal_plans(name: str, trace: list[tuple[float, int, int]]) -> None:
    assert _drive(_make(name), _jobs(trace)).plans == _drive(_make(name), _jobs(trace)).plans


@pytest.mark.parametrize("name", NAMES)
@given(trace=arrivals)
@settings(max_examples=10, deadline=None)
def test_the_stateless_interface_serves_the_same_tokens(name: str, trace: list[tuple[float, int, int]]) -> None:
    jobs = _jobs(trace)
    run = _drive(_make(name), jobs, stateless=True)
    assert run.computed == {job.key: job.remaining_tokens for job in jobs}


@pytest.mark.parametrize("name", ["lanewise", "laps-adaptive-8192"])
@given(trace=arrivals)
@settings(max_examples=40, deadline=None)
def test_the_window_never_passes_the_least_slack(name: str, trace: list[tuple[float, int, int]]) -> None:
    for now, until, slack_end in _drive(_make(name), _jobs(trace)).holds:
        assert now < until <= slack_end + 1e-9


@pytest.mark.parametrize(("tokens", "short"), [(2000, 20), (6000, 300), (12000, 64)])
def test_nothing_starves_under_endless_urgent_work(tokens: int, short: int) -> None:
    """Short requests that alone fill the worker for ever: the late one still gets its share of each batch."""
    policy = _make("lanewise")
    policy.add(Job("late", 0.0, tokens, 0, TARGET_S))
    now, left, count, waiting = 0.0, tokens, 0, 0
    # The wait before the share begins, the bonus others may have over it, and its work at a quarter of the speed.
    bound = 15 + 5 * COST.chunked(tokens, 0, 384)
    while left:
        while waiting < 700:
            count += 1
            waiting += short
            policy.add(Job(count, now, short, 0, now + TARGET_S))
        plan = policy.next_batch(now)
        now += COST.prefill((n, policy.jobs[k].context_tokens, False) for k, n in plan.chunks)
        for key, new in plan.chunks:
            left -= new if key == "late" else 0
            waiting -= new if key != "late" else 0
            policy.progress(key, new)
        assert now < bound


def test_short_goes_before_long_and_late_after_both() -> None:
    policy = _make("lanewise", 512)
    policy.add(Job("late", 0.0, 5000, 0, 0.4))
    policy.add(Job("long", 0.5, 900, 0, 0.9))
    policy.add(Job("short", 0.55, 20, 0, 0.95))
    assert [key for key, _ in policy.next_batch(0.56).chunks][:2] == ["short", "long"]


def test_a_request_is_given_up_only_for_more_others() -> None:
    """One prompt of 300 ms against four of 90 ms, all due now: four are on time, whoever came first."""
    policy = _make("lanewise")
    policy.add(Job("big", 0.0, 2500, 0, 0.4))
    for key in range(4):
        policy.add(Job(key, 0.01, 700, 0, 0.41))
    run = _drive(policy, [])
    now, ends = 0.02, {}
    while policy.jobs:
        plan = policy.next_batch(now)
        now += COST.prefill(
            (n, policy.jobs[k].context_tokens, n == policy.jobs[k].remaining_tokens) for k, n in plan.chunks
        )
        for key, new in plan.chunks:
            policy.progress(key, new)
            ends[key] = now
    assert not run.plans
    assert sum(end <= 0.41 for key, end in ends.items() if key != "big") == 4


def test_removed_jobs_are_not_planned() -> None:
    for name in NAMES:
        policy = _make(name)
        policy.add(Job("a", 0.0, 9000, 0, 0.4))
        policy.add(Job("b", 0.0, 300, 0, 0.4))
        policy.next_batch(1.0)
        policy.remove("a")
        policy.remove("unknown")
        assert [key for key, _ in policy.next_batch(1.0).chunks] == ["b"]
        policy.remove("b")
        assert policy.next_batch(1.0) == BatchPlan()


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown batch policy 'fifo'.*lanewise"):
        _make("fifo")


def test_quantum_follows_target_and_model() -> None:
    """Twice the target: about twice the batch; a faster device: more tokens."""

    def planned(target: float, scale: float) -> int:
        cost = type(COST)(**{name: value * scale for name, value in COST.to_mapping().items()})
        policy = make_batch_policy("lanewise", max_batch_tokens=8192, cost=cost)
        for key in range(60):
            policy.add(Job(key, key * 0.01, 500, 0, key * 0.01 + target))
            if key == 0:
                assert policy.next_batch(0.0).tokens, "a batch that keeps the others waiting"
            if key < 57:
                policy.progress(key, 500)
        return policy.next_batch(0.6).tokens

    assert planned(0.8, 1.0) > 1.5 * planned(0.4, 1.0)
    assert planned(0.4, 0.5) > 1.5 * planned(0.4, 1.0)


@settings(max_examples=30, deadline=None)
@given(arrivals)
def test_a_job_that_is_added_again_is_no_new_arrival(trace: list[tuple[float, int, int]]) -> None:
    """A worker does so when it learns its cache hit; the window's rate and the closed-loop sign must not see double."""

    class Twice(LengthAware):
        def add(self, job: Job) -> None:
            super().add(job)
            super().add(job)

    once, twice = (kind(max_batch_tokens=512, cost=COST) for kind in (LengthAware, Twice))
    assert _drive(once, _jobs(trace)).plans == _drive(twice, _jobs(trace)).plans


def _steady(waiting: int) -> int:
    """Tokens of the batch that `waiting` short requests and a long one find, when less than two are usual."""
    policy = _make("lanewise", 8192)
    for key in range(300):
        policy.add(Job(key, key * 0.01, 20, 0, key * 0.01 + TARGET_S))
        if key == 0:
            assert policy.next_batch(0.0).tokens, "a batch that keeps the others waiting"
        policy.progress(key, 20)
    policy.add(Job("long", 2.99, 2000, 0, 2.99 + TARGET_S))
    for key in range(waiting):
        policy.add(Job(("short", key), 3.0, 20, 0, 3.0 + TARGET_S))
    return policy.next_batch(3.0).tokens


def test_a_batch_is_shorter_the_more_requests_wait_for_it() -> None:
    """All wait for its end. But it never gets too short for those who would have fitted."""
    assert _steady(0) > _steady(2) > _steady(5)
    assert _steady(12) >= 12 * 20


def test_a_batch_grows_for_a_request_with_no_slack_left() -> None:
    """However little slack is left to 2,000 tokens of work, as long as they can be on time."""

    def planned(deadline: float) -> int:
        policy = _make("lanewise", 8192)
        policy.add(Job("first", 0.0, 20, 0, TARGET_S))
        assert policy.next_batch(0.0).tokens, "a batch that keeps the other waiting"
        policy.progress("first", 20)
        policy.add(Job("long", 1.0 - TARGET_S / 2, 2000, 0, deadline))
        return policy.next_batch(1.0).tokens

    ample = planned(1.0 + 2 * COST.alone(2000))
    assert max(planned(1.0 + COST.alone(2000) + 0.002 * i) for i in range(30)) > 1.2 * ample


def test_an_old_late_request_among_little_late_work_gets_a_share_and_among_much_its_turn() -> None:
    def share(others: int) -> int:
        policy = _make("lanewise")
        policy.add(Job("old", 0.0, 3900, 0, TARGET_S))
        for key in range(others):
            policy.add(Job(key, 1.0, 4000, 0, 1.0 + TARGET_S))
        for key in range(4):
            policy.add(Job(("urgent", key), 9.0, 600, 0, 9.0 + TARGET_S))
        return dict(policy.next_batch(9.0).chunks).get("old", 0)

    assert share(0) > 0, "8 s are more than 7 targets and 4 times its own half second"
    assert share(20) == 0, "8 s are little where 10 s of work wait"
