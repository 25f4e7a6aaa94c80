"""The fit of a whole cost model: it predicts what it never saw, and says how far off it is."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lanewise.policy.cost import CostModel
from lanewise.policy.fit import Measured, fit_cost
from lanewise.policy.meter import usual_step_s

TRUTH = CostModel(
    compute_s=90e-6,
    weights_s=2.2e-3,
    attention_s=30e-9,
    kv_read_s=150e-9,
    head_compute_s=60e-6,
    head_weights_s=0.9e-3,
    launch_s=0.4e-3,
    request_s=0.05e-3,
    decode_request_s=0.09e-3,
)


def sweep(truth: CostModel, noise: float, seed: int) -> list[Measured]:
    draw = random.Random(seed)
    kinds = [
        (((n, c, finishes),), 0, 0) for n in (1, 8, 32, 64, 256, 512) for c in (0, 512) for finishes in (True, False)
    ]
    kinds += [(((32, 0, True),) * count, 0, 0) for count in (2, 4, 8)]
    kinds += [((), count, count * context) for count in (1, 4, 16) for context in (64, 1024)]
    blank = [Measured(chunks, decoding, context, 1.0) for chunks, decoding, context in kinds]
    return [replace(item, seconds=item.predicted_s(truth) * draw.lognormvariate(0, noise)) for item in blank]


@pytest.mark.parametrize("seed", range(3))
def test_it_predicts_batches_that_were_not_in_the_sweep(seed: int) -> None:
    fitted = fit_cost(sweep(TRUTH, 0.02, seed), CostModel())
    unseen = [Measured(((n, c, True),), 0, 0, 1.0) for n in (5, 100, 400) for c in (0, 200, 900)]
    unseen += [Measured(((48, 0, True),) * 5, 0, 0, 1.0), Measured((), 9, 4000, 1.0)]
    for item in unseen:
        assert item.predicted_s(fitted.cost) == pytest.approx(item.predicted_s(TRUTH), rel=0.06), item
    assert fitted.mean_error < 0.03


def test_noise_shows_in_the_errors() -> None:
    quiet, loud = (fit_cost(sweep(TRUTH, noise, 1), CostModel()) for noise in (0.01, 0.2))
    assert quiet.mean_error < 0.02 < 0.08 < loud.mean_error < loud.worst_error


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot settle"):
        fit_cost(sweep(TRUTH, 0.0, 0)[:5], CostModel())


def test_a_pause_is_no_usual_step_and_a_quota_is():
    assert usual_step_s([0.003] * 31 + [5.0]) == pytest.approx(0.003)
    assert usual_step_s(([0.003] * 7 + [0.080]) * 4) == pytest.approx(0.0104, rel=0.05)
