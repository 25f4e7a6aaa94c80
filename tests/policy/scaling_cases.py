"""Observations and rules for the tests of scaling decisions."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from lanewise.policy.profile import make_profile
from lanewise.policy.scaling import decide
from lanewise.policy.scaling_types import Decision, Demand, Observation, RoleView, Rules, State

PROFILE = make_profile("qwen2.5-32b", "h200", 1)
ROLE = RoleView(1, 1, cost=PROFILE.cost, kv_capacity_tokens=PROFILE.kv_capacity_tokens, watts=700.0)
RULES = Rules(1, 8, 1, 8, ttft_s=1.0, tpot_s=0.05)
PERIOD_S = 15.0


def demand(rate: float, prompt: float = 1100.0, output: float = 200.0, seconds: float = PERIOD_S) -> Demand:
    """Steady requests of about these lengths."""
    count = rate * seconds
    return Demand(
        seconds=seconds,
        requests=count,
        prompt_tokens=count * prompt,
        prompt_squares=count * prompt * prompt * 2,
        uncached_tokens=count * prompt,
        uncached_squares=count * prompt * prompt * 2,
        attended=count * prompt * prompt,
        output_tokens=count * output,
        finished=count,
        attainable=count,
        able=count,
        able_tokens=count * prompt,
        able_squares=count * prompt * prompt * 2,
        able_attended=count * prompt * prompt,
    )


def observe(at_s: float, counts: tuple[int, int], load: Demand, **changes: object) -> Observation:
    prefill, decode = (replace(ROLE, desired=n, ready=n) for n in counts)
    return replace(Observation(at_s, load, prefill, decode), **changes)  # type: ignore[arg-type]


def drive(rules: Rules, loads: list[Demand], counts: tuple[int, int] = (1, 1)) -> list[Decision]:
    """Decisions in a row; pods are up at once."""
    state, found = State(), []
    for number, load in enumerate(loads):
        decision = decide(rules, state, observe((number + 1) * PERIOD_S, counts, load))
        counts, state = (decision.prefill, decision.decode), decision.state
        found.append(decision)
    return found


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    """Rules that at least one pair of counts satisfies."""
    p, d = draw(st.integers(1, 12)), draw(st.integers(1, 12))  # this pair does
    ratio = 100 * p // d
    gpus = draw(st.none() | st.integers(p + d, 30))
    watts = draw(st.none() | st.integers((p + d) * 700, 30_000))
    return replace(
        RULES,
        prefill_min=draw(st.integers(1, p)),
        prefill_max=draw(st.integers(p, 15)),
        decode_min=draw(st.integers(1, d)),
        decode_max=draw(st.integers(d, 15)),
        min_ratio_percent=draw(st.integers(0, ratio)),
        max_ratio_percent=draw(st.integers(ratio + 1, 2000)),
        gpus=gpus,
        watts=watts,
        up_per_minute=draw(st.sampled_from([0.1, 1.0, 10.0])),
        zero_after_s=draw(st.none() | st.just(45.0)),
    )


loads = st.builds(
    demand,
    st.floats(0, 200) | st.just(0.0),
    prompt=st.floats(1, 20_000),
    output=st.floats(1, 2000),
)
