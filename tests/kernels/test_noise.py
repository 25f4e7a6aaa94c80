"""Gumbel noise: pure, the same in any company, and distributed as it should be."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.kernels.noise import gumbel

EULER = 0.5772156649


def noise_of(seeds, positions, num_entries):
    """Of the first `num_entries` entries of a vocabulary."""
    return gumbel(seeds, positions, torch.arange(num_entries))


@given(
    rows=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31)), min_size=1, max_size=20),
    entries=st.integers(1, 1000),
)
@settings(max_examples=50, deadline=None)
def test_a_row_alone_equals_the_row_in_a_batch(rows, entries):
    seeds, positions = [seed for seed, _ in rows], [position for _, position in rows]
    together = noise_of(seeds, positions, entries)
    assert together.isfinite().all()
    for row, (seed, position) in zip(together, rows, strict=True):
        alone = noise_of([seed], [position], entries)[0]
        assert torch.equal(row, alone)
        assert torch.equal(noise_of([seed], [position], entries + 7)[0, :entries], alone)
        some = torch.arange(entries - 1, -1, -3)
        assert torch.equal(gumbel([seed], [position], some)[0], alone[some])


def test_known_values():
    """Frozen: a change here changes every sampled token of every user, and breaks resuming across versions."""
    noise = noise_of([0, 2**64 - 1], [0, 12345], 3)
    expected = [[1.249933, 3.022107, 2.838837], [3.207138, 0.497708, -1.172853]]
    torch.testing.assert_close(noise, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_distribution():
    noise = noise_of(range(100), [7] * 100, 10_000).double().flatten()
    assert abs(noise.mean() - EULER) < 0.005
    assert abs(noise.var() - math.pi**2 / 6) < 0.01
    for level in (0.001, 0.1, 0.5, 0.9, 0.999):
        below = (noise < -math.log(-math.log(level))).double().mean()
        assert abs(below - level) < 5 * math.sqrt(level * (1 - level) / len(noise))


def test_rows_columns_and_neighbours_are_independent():
    by_seed = noise_of(range(300), [0] * 300, 1000)
    by_position = noise_of([0] * 300, range(300), 1000)
    for noise in (by_seed, by_position):
        assert len(noise.unique()) > 0.98 * noise.numel()  # fp32 has that many values only
        for axis in (noise, noise.T):
            correlations = torch.corrcoef(axis)
            correlations.fill_diagonal_(0)
            assert correlations.abs().max() < 6 / math.sqrt(axis.shape[1])
    assert not torch.equal(by_seed[1], by_position[1])
