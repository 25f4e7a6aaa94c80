"""How much of a prompt is computed in a step that decodes as well."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lanewise.policy.beside import STALL_S, beside_decoding
from lanewise.policy.cost import CostModel

CORES = replace(CostModel(), compute_s=0.45e-3, weights_s=6e-3)  # 118 M parameters on two cores


def test_a_step_lasts_about_the_stall() -> None:
    tokens = beside_decoding(CORES, 512)
    assert 64 < tokens < 128
    assert CORES.batch(tokens, 0.0, 0, 1) == pytest.approx(STALL_S, rel=0.03)


def test_the_limit_of_the_worker_stays_the_limit() -> None:
    assert beside_decoding(replace(CORES, compute_s=1e-6), 512) == 512
    assert beside_decoding(CORES, 32) == 32


def test_where_reading_the_weights_takes_longer_a_step_is_worth_it() -> None:
    slow = replace(CORES, weights_s=0.2)
    assert slow.knee_tokens < beside_decoding(slow, 4096) < 2 * slow.knee_tokens
