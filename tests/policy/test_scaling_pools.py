"""Mixes of pools: within pools and budgets, the cheapest there is, never cheaper for more load, pure."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.policy.profile import make_profile
from lanewise.policy.scaling_capacity import DecodeLoad, PrefillWork, prefill_work
from lanewise.policy.scaling_pools import Ask, Load, Mix, Pool, Worth, cheapest, fits, price_of, worth
from lanewise.policy.scaling_types import Demand

COST = make_profile("qwen2.5-32b", "h200", 1).cost


@st.composite
def pools(draw: st.DrawFn) -> list[Pool]:
    return [
        Pool(
            f"p{index}",
            COST,
            200_000,
            draw(st.integers(1, 40)) / 4,
            draw(st.integers(0, 4)),
            gpus=draw(st.integers(1, 2)),
            watts=100.0 * draw(st.integers(1, 7)),
        )
        for index in range(draw(st.integers(1, 3)))
    ]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Pool], Worth, Ask]:
    found = draw(pools())
    value = tuple((draw(st.integers(0, 8)) / 4, draw(st.integers(0, 8)) / 4) for _ in found)
    counts = [tuple(draw(st.integers(0, 2)) for _ in found) for _ in range(2)]
    return (
        found,
        value,
        Ask(
            draw(st.integers(0, 5)),
            draw(st.integers(0, 5)),
            draw(st.none() | st.integers(0, 12)),
            draw(st.none() | st.integers(0, 5000)),
            draw(st.none() | st.just(Mix(*counts))),
        ),
    )


def covers(value: Worth, ask: Ask, mix: Mix, share: float = 1.0) -> bool:
    return all(
        sum(one[role] * n for one, n in zip(value, counts, strict=True)) >= share * wanted - 1e-6
        for role, (counts, wanted) in enumerate(((mix.prefill, ask.prefill), (mix.decode, ask.decode)))
    )


def every_mix(found: list[Pool]) -> list[Mix]:
    counts = list(product(*(range(pool.most + 1) for pool in found)))
    return [Mix(p, d) for p in counts for d in counts]


@given(problems())
@settings(deadline=None, max_examples=80)
def test_the_cheapest_of_all_mixes_within_pools_and_budgets(problem: tuple[list[Pool], Worth, Ask]) -> None:
    """Against every mix there is."""
    found, value, ask = problem
    choice = cheapest(found, value, ask)
    assert fits(found, ask, choice.mix)
    assert covers(value, ask, choice.mix, choice.share)
    assert choice.price_per_hour == pytest.approx(price_of(found, choice.mix))
    enough = [mix for mix in every_mix(found) if fits(found, ask, mix) and covers(value, ask, mix)]
    assert (choice.share == 1) == bool(enough)
    if enough:
        assert choice.price_per_hour <= min(price_of(found, mix) for mix in enough) + 1e-6


@given(problems())
@settings(deadline=None, max_examples=60)
def test_never_dearer_than_the_best_single_pool(problem: tuple[list[Pool], Worth, Ask]) -> None:
    found, value, ask = problem
    choice = cheapest(found, value, ask)
    for index in range(len(found)):
        for p, d in product(range(found[index].most + 1), repeat=2):
            mix = Mix(*(tuple(n if i == index else 0 for i in range(len(found))) for n in (p, d)))
            if fits(found, ask, mix) and covers(value, ask, mix):
                assert choice.price_per_hour <= price_of(found, mix) + 1e-6


@given(problems(), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_more_load_is_never_cheaper_nor_better_served(problem: tuple[list[Pool], Worth, Ask], p: int, d: int) -> None:
    found, value, ask = problem
    more = Ask(ask.prefill + p, ask.decode + d, ask.gpus, ask.watts, ask.present)
    small, large = cheapest(found, value, ask), cheapest(found, value, more)
    assert large.share <= small.share
    if large.share == 1:
        assert large.price_per_hour >= small.price_per_hour - 1e-6


@given(problems(), st.sampled_from([0.0, 0.05, 0.5]))
@settings(deadline=None, max_examples=60)
def test_patience_has_its_price_and_spares_swaps(problem: tuple[list[Pool], Worth, Ask], patience: float) -> None:
    found, value, ask = problem
    strict, patient = cheapest(found, value, ask), cheapest(found, value, ask, patience)
    assert patient == cheapest(found, value, ask, patience)
    assert patient.share == strict.share
    assert patient.price_per_hour <= strict.price_per_hour * (1 + patience) + 1e-6
    if ask.present is not None:

        def changes(mix: Mix) -> int:
            assert ask.present is not None
            there = (*ask.present.prefill, *ask.present.decode)
            return sum(abs(a - b) for a, b in zip(there, (*mix.prefill, *mix.decode), strict=True))

        assert changes(patient.mix) <= changes(strict.mix)


def test_what_holds_a_pool_or_budget_counts_until_it_is_gone() -> None:
    old, new = Pool("old", COST, 1, 2.0, 4), Pool("new", COST, 1, 1.0, 4)
    value = ((1.0, 1.0), (1.0, 1.0))
    there = Mix((2, 0), (1, 0))
    assert cheapest([old, new], value, Ask(2, 1, 6, present=there)).mix == Mix((0, 2), (0, 1))
    assert cheapest([old, new], value, Ask(2, 1, 5, present=there)).mix != Mix((0, 2), (0, 1))
    leaving = Mix((0, 3), (0, 0))
    held = cheapest([old, new], value, Ask(2, 1, present=there, leaving=leaving)).mix
    assert held.used(1) <= 1


def test_a_worker_is_worth_what_it_holds_at_the_same_targets() -> None:
    names = {"h200": 1, "h100": 2, "a100": 2}
    profiles = [make_profile("qwen2.5-32b", name, count) for name, count in names.items()]
    made = [Pool(p.name, p.cost, p.kv_capacity_tokens, p.price_per_hour, 9) for p in profiles]
    prompts = {"tokens": 1e5, "squares": 2e8, "attended": 1e8}  # of 100 requests
    shape = Demand(
        1.0,
        requests=100,
        prompt_tokens=1e5,
        uncached_tokens=1e5,
        uncached_squares=2e8,
        attended=1e8,
        able=100,
        **{f"able_{name}": value for name, value in prompts.items()},
    )

    def load(ttft_s: float, tpot_s: float = 0.05) -> Load:
        works: tuple[PrefillWork, ...] = tuple(prefill_work(p.cost, ttft_s, shape) for p in (*profiles, profiles[0]))
        return Load(works, DecodeLoad(0.0, 1200.0, 1.0), ttft_s, tpot_s, 0.03)

    own, twice, slow = worth(made, made[0], load(1.0), 2, 2)
    assert own == pytest.approx((1.0, 1.0))
    assert twice[0] > 1.5  # two GPUs under one worker
    assert slow[0] < own[0]
    impossible = worth(made, made[0], load(0.14), 2, 2)
    assert impossible[2][0] == 0.0, "a mean prompt takes this GPU longer than the target"
    assert worth(made, made[0], load(1.0, 0.012), 2, 2)[0] == (pytest.approx(own[0]), 0.0)
