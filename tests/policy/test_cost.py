"""The cost model: golden values, the published table, the inverse, refitting."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanewise.errors import ConfigError
from lanewise.policy.cost import CostModel
from lanewise.policy.profile import make_profile, parse_profile, shipped_devices, shipped_models
from lanewise.policy.refit import WARM_BATCHES, CostFit

H200 = make_profile("qwen2.5-32b", "h200", 1).cost

GOLDEN_MS = [  # qwen2.5-32b on one H200, ηc .55: [(new, cached, finishes)] -> ms
    ([(1, 0, True)], 16.418),
    ([(128, 0, True)], 22.669),
    ([(256, 0, True)], 34.965),
    ([(512, 0, True)], 63.354),
    ([(1024, 0, True)], 123.213),
    ([(8192, 0, True)], 1054.405),
    ([(512, 8192, False)], 75.334),
    ([(17, 0, True)] * 8, 24.021),
    ([(300, 2048, True), (212, 0, False)], 65.077),
    ([(64, 65536, True)], 30.592),
]


@pytest.mark.parametrize(("chunks", "expected_ms"), GOLDEN_MS)
def test_golden_batches(chunks: list[tuple[int, int, bool]], expected_ms: float) -> None:
    assert H200.prefill(chunks) * 1e3 == pytest.approx(expected_ms, abs=5e-4)


PUBLISHED = {  # kernel efficiency .655: n = 1, 128, 256, 1024, 8192, and a decode step of 32 × 2048
    ("qwen2.5-7b", 1): (4.5, 5.5, 7.6, 23, 201, 6.0),
    ("qwen2.5-32b", 1): (16.4, 21, 31, 105, 904, 21),
    ("qwen2.5-72b", 2): (20.6, 27, 40, 131, 1096, 25),
}


@pytest.mark.parametrize(("model", "tp"), PUBLISHED)
def test_published_table(model: str, tp: int) -> None:
    cost = make_profile(model, "h200", tp, compute_efficiency=0.655).cost
    found = [cost.alone(n) * 1e3 for n in (1, 128, 256, 1024, 8192)] + [cost.decode(32, 32 * 2048) * 1e3]
    assert found == pytest.approx(PUBLISHED[model, tp], rel=0.01, abs=0.6)  # it is rounded


@given(st.integers(1, 8000), st.integers(0, 30000))
def test_a_batch_costs_at_least_its_marginal_work(new: int, cached: int) -> None:
    assert H200.alone(new, cached) >= H200.work(new, cached) + H200.start_s - 1e-12
    assert H200.chunked(new, cached, 512) >= H200.alone(new, cached) - 1e-9


@given(st.floats(0.02, 5.0))
def test_tokens_in_inverts_the_batch_time(seconds: float) -> None:
    tokens = H200.tokens_in(seconds)
    assert tokens > 0
    compute = (H200.compute_s * tokens) ** 2 + H200.weights_s**2
    rest = H200.elementwise_s * tokens + H200.launch_s + H200.request_s
    assert compute**0.5 + rest == pytest.approx(seconds, rel=1e-6)


def test_tokens_in_is_zero_below_the_fixed_cost() -> None:
    assert H200.tokens_in(0.001) == 0.0


def test_mapping_round_trip_ignores_unknown_names() -> None:
    assert CostModel.from_mapping(H200.to_mapping() | {"from_the_future": 1.0}) == H200


def test_every_shipped_model_fits_every_device() -> None:
    for model in shipped_models():
        for device in shipped_devices():
            profile = make_profile(model, device)
            assert profile.kv_capacity_tokens > 32768
            assert profile.watts > 0
            assert profile.price_per_hour > 0


def test_profile_errors_name_the_field() -> None:
    with pytest.raises(ConfigError, match="unknown field 'modle'"):
        parse_profile({"modle": "x"})
    with pytest.raises(ConfigError, match="no shipped profile"):
        parse_profile({"model": "qwen2.5-32b", "device": "abacus"})
    with pytest.raises(ConfigError, match="kv_capacity_tokens"):
        parse_profile({"coefficients": {}, "kv_bytes_per_token": 1})


def test_measured_profile() -> None:
    data = {"name": "mine", "coefficients": {"compute_s": 1e-4}, "kv_bytes_per_token": 10, "kv_capacity_tokens": 99}
    profile = parse_profile(data)
    assert (profile.cost.compute_s, profile.kv_capacity_tokens) == (1e-4, 99)


def _batches(count: int, seed: int) -> list[list[tuple[int, int, bool]]]:
    draw = random.Random(seed)
    return [
        [(draw.randint(1, 600), draw.choice((0, 0, 4000)), draw.random() < 0.7) for _ in range(draw.randint(1, 4))]
        for _ in range(count)
    ]


def test_refit_learns_another_device() -> None:
    truth = replace(H200, compute_s=H200.compute_s * 3, weights_s=H200.weights_s * 0.5, launch_s=0.004)
    fit, draw = CostFit(H200), random.Random(1)
    for chunks in _batches(600, 2):
        fit.observe_prefill(chunks, truth.prefill(chunks) * draw.uniform(0.95, 1.05))
    errors = [abs(fit.model.prefill(c) / truth.prefill(c) - 1) for c in _batches(200, 3)]
    assert sorted(errors)[180] < 0.06


def test_refit_survives_absurd_measurements() -> None:
    fit = CostFit(H200)
    for chunks in _batches(300, 4):
        fit.observe_prefill(chunks, H200.prefill(chunks))
    for seconds in (0.0, -1.0, float("nan"), float("inf"), 600.0):
        fit.observe_prefill([(100, 0, True)], seconds)
    fit.observe_decode(8, 8000, H200.decode(8, 8000))
    assert fit.model.alone(512) == pytest.approx(H200.alone(512), rel=0.5)


def test_one_paused_batch_teaches_nothing() -> None:
    fit = CostFit(H200)
    fit.observe_prefill([(64, 0, True)], 9.0)  # the process slept; right at the start, where all else is believed
    assert fit.model == H200
    for _ in range(1 + WARM_BATCHES):
        fit.observe_prefill([(64, 0, True)], 9.0)  # it is that slow
    assert fit.model.prefill([(64, 0, True)]) > 0.1


def test_a_first_batch_on_a_crowded_machine_does_not_make_the_worker_look_dead() -> None:
    """A prediction a thousand times too long sheds everything, and then nothing is measured that would correct it."""
    fit = CostFit(H200)
    before = fit.model.alone(1536)
    fit.observe_prefill([(64, 0, True)], 1000 * fit.model.alone(64))
    assert fit.model.alone(1536) == before
    for _ in range(WARM_BATCHES - 2):
        fit.observe_prefill([(64, 0, True)], 30 * fit.model.alone(64))
        assert fit.model.alone(1536) == before, "nobody is shed on the word of a few batches"


def test_a_slow_batch_among_many_of_one_size_is_not_laid_to_what_they_do_not_show() -> None:
    """Under a full queue all batches are full, and how a batch's time divides cannot be told from them."""
    fit, draw = CostFit(H200), random.Random(2)
    for number in range(600):
        chunks = [(1024, 0, True)] if number > 40 else [(draw.choice((16, 64, 256, 1024)), 0, True)]
        fit.observe_prefill(chunks, H200.prefill(chunks) * draw.uniform(0.9, 1.1))
    for _ in range(3):
        fit.observe_prefill([(8, 0, True)], 3 * H200.prefill([(8, 0, True)]))
    assert fit.model.launch_s < 6 * H200.launch_s
    assert fit.model.alone(512) < 1.5 * H200.alone(512)
