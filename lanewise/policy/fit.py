"""A cost model from a sweep of measured batches: every coefficient that the sweep can tell apart, by least squares.

Owns: the fit and its residuals. Must not: measure (`engine/measure.py` does) or follow a device that changes
(`refit.py` does, with four scales; here each coefficient is free).

Errors are relative, so a millisecond at one token counts as much as ten at a thousand. Working on logarithms keeps the
coefficients positive; a weak pull towards the first model settles what no measurement decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log

from lanewise.policy.cost import CostModel

COEFFICIENTS = (
    "compute_s",
    "weights_s",
    "attention_s",
    "kv_read_s",
    "head_compute_s",
    "head_weights_s",
    "launch_s",
    "request_s",
    "decode_request_s",
)
"""Elementwise work is counted as compute and communication as launch: on one device no batch tells them apart."""

PULL = 1e-3  # weight of the first model against one measurement
ROUNDS = 60
STEP = 1e-4  # of a logarithm, for the numerical slopes
LONGEST_MOVE = 1.0  # of a logarithm in one round


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of step and how long it takes: prefill chunks (new, cached, finishes) beside decoding sequences."""

    chunks: tuple[tuple[int, int, bool], ...]
    decoding: int
    context_tokens: int  # of the decoding sequences together
    seconds: float

    def predicted_s(self, cost: CostModel) -> float:
        if not self.decoding:
            return cost.prefill(self.chunks)
        if not self.chunks:
            return cost.decode(self.decoding, self.context_tokens)
        return cost.mixed(self.chunks, self.decoding, self.context_tokens)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The model, and the mean and worst relative error over the measurements."""

    cost: CostModel
    mean_error: float
    worst_error: float


def fit_cost(measured: Sequence[Measured], first: CostModel) -> Fitted:
    """Levenberg–Marquardt on the logarithms of `COEFFICIENTS`, from `first`. ValueError with too few measurements."""
    if len(measured) < len(COEFFICIENTS):
        raise ValueError(f"{len(measured)} measurements cannot settle {len(COEFFICIENTS)} coefficients")
    origin = [log(max(getattr(first, name), 1e-12)) for name in COEFFICIENTS]
    at, damping = list(origin), 1e-2
    errors = _errors(measured, first, at)
    best = _loss(errors, at, origin)
    for _ in range(ROUNDS):
        normal, right = _normal_equations(measured, first, at, errors, origin)
        for i in range(len(at)):
            normal[i][i] *= 1 + damping
        step = [max(-LONGEST_MOVE, min(move, LONGEST_MOVE)) for move in _solve(normal, right)]
        moved = [value + move for value, move in zip(at, step, strict=True)]
        tried = _errors(measured, first, moved)
        loss = _loss(tried, moved, origin)
        if loss < best:
            at, errors, best, damping = moved, tried, loss, damping / 3
            if max(map(abs, step)) < 1e-6:
                break
        else:
            damping *= 4
    sizes = [abs(exp(error) - 1) for error in errors]
    return Fitted(_model(first, at), sum(sizes) / len(sizes), max(sizes))


def _model(first: CostModel, at: Sequence[float]) -> CostModel:
    values = {name: exp(value) for name, value in zip(COEFFICIENTS, at, strict=True)}
    return replace(first, elementwise_s=0.0, comm_s=0.0, comm_token_s=0.0, **values)


def _errors(measured: Sequence[Measured], first: CostModel, at: Sequence[float]) -> list[float]:
    """log(predicted ÷ measured)."""
    cost = _model(first, at)
    return [log(item.predicted_s(cost) / item.seconds) for item in measured]


def _loss(errors: Sequence[float], at: Sequence[float], origin: Sequence[float]) -> float:
    pulled = PULL * sum((a - b) ** 2 for a, b in zip(at, origin, strict=True))
    return sum(error * error for error in errors) + pulled


def _normal_equations(
    measured: Sequence[Measured],
    first: CostModel,
    at: Sequence[float],
    errors: Sequence[float],
    origin: Sequence[float],
) -> tuple[list[list[float]], list[float]]:
    count = len(at)
    slopes = []
    for i in range(count):
        moved = [value + STEP * (i == j) for j, value in enumerate(at)]
        after = _errors(measured, first, moved)
        slopes.append([(b - a) / STEP for a, b in zip(errors, after, strict=True)])
    normal = [
        [sum(a * b for a, b in zip(slopes[i], slopes[j], strict=True)) for j in range(count)] for i in range(count)
    ]
    right = [-sum(s * e for s, e in zip(slopes[i], errors, strict=True)) for i in range(count)]
    for i in range(count):
        normal[i][i] += PULL
        right[i] -= PULL * (at[i] - origin[i])
    return normal, right


def _solve(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Gauss elimination; the matrix is positive definite (`PULL` on its diagonal)."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
