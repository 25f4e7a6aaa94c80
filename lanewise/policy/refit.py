"""Online refitting of a cost model from measured batches.

Owns: recursive least squares with forgetting, on the logarithms of four scales, guarded against absurd measurements.
Must not: time anything; the worker hands in what it measured.

The four scales multiply groups of coefficients that a batch cannot tell apart: compute, weights, attention, fixed.
Working on logarithms keeps them positive, and the formula is linearised at each step (an extended Kalman filter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp, log, sqrt

from lanewise.policy.cost import CostModel

FORGET = 0.995  # per batch: the last few hundred count
MAX_SCALE = 100.0  # of the first model, up or down: beyond it is a broken clock, not a device
OUTLIER = 3.0  # a batch further off than this moves the fit as one just that far off
WARM_BATCHES = 10  # until then the first model stands: first batches pay for caches, pages and other starts
PAUSE_FACTOR = 10.0  # a batch this much slower than predicted counts only if the next one is too: processes get paused
MIN_BATCH_S = 1e-6
PRIOR_VARIANCE = 4.0
MAX_VARIANCE = 0.25
"""Of a scale's logarithm once the model stands. Forgetting must not let a scale that the batches hardly show move by
more than they show: under a full queue all are of one size, and one slow batch would be laid to whatever is small."""

Chunk = tuple[int, int, bool]  # new tokens, cached tokens, finishes its prompt
GROUPS = 4


class CostFit:
    """The running fit of one worker; `model` is the current estimate, after WARM_BATCHES batches.

    Routers shed by it, so it must rest on more than a few batches: a prediction far too long would keep away the
    requests that could correct it.
    """

    def __init__(self, first: CostModel) -> None:
        self._first = first
        self._log_scale = [0.0] * GROUPS
        self._covariance = [[PRIOR_VARIANCE if i == j else 0.0 for j in range(GROUPS)] for i in range(GROUPS)]
        self._batches = 0
        self._paused = False
        self.model = first

    @property
    def batches(self) -> int:
        """That `model` was fitted to; 0 while it is the first one."""
        return self._batches if self._batches >= WARM_BATCHES else 0

    def observe_prefill(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """One prefill batch took `seconds`."""
        tokens = sum(new for new, _, _ in chunks)
        attention = sum(self._first.attention(new, cached) for new, cached, _ in chunks)
        finishing = sum(finishes for _, _, finishes in chunks)
        self._update(tokens, attention, finishing, self._first.request_s * len(chunks), seconds)

    def observe_decode(self, requests: int, context_tokens: int, seconds: float) -> None:
        """One decode step took `seconds`."""
        attention = self._first.kv_read_s * context_tokens
        self._update(requests, attention, requests, self._first.decode_request_s * requests, seconds)

    def _update(self, tokens: int, attention: float, finishing: int, per_request: float, seconds: float) -> None:
        if not MIN_BATCH_S < seconds < float("inf"):
            return
        predicted, slope = self._predict(tokens, attention, finishing, per_request)
        # Errors are relative: a 2 ms miss on a 4 ms step tells more than on a 900 ms batch.
        error = log(seconds / predicted)
        if error > log(PAUSE_FACTOR) and not self._paused:
            self._paused = True
            return
        self._paused = False
        error = min(error, log(PAUSE_FACTOR))
        if self._batches >= WARM_BATCHES:
            error = max(-log(OUTLIER), min(error, log(OUTLIER)))
        slope = [value / predicted for value in slope]
        gain_raw = [sum(self._covariance[i][j] * slope[j] for j in range(GROUPS)) for i in range(GROUPS)]
        noise = 0.01 + sum(slope[i] * gain_raw[i] for i in range(GROUPS))
        limit = log(MAX_SCALE)
        for i in range(GROUPS):
            moved = self._log_scale[i] + gain_raw[i] / noise * error
            self._log_scale[i] = max(-limit, min(moved, limit))
        for i in range(GROUPS):
            for j in range(GROUPS):
                self._covariance[i][j] = (self._covariance[i][j] - gain_raw[i] * gain_raw[j] / noise) / FORGET
        self._batches += 1
        if self._batches >= WARM_BATCHES:
            self._bound_covariance()
            self.model = self._scaled()

    def _bound_covariance(self) -> None:
        """Scales rows and columns together, so that it stays a covariance."""
        factors = [sqrt(min(MAX_VARIANCE / self._covariance[i][i], 1.0)) for i in range(GROUPS)]
        for i in range(GROUPS):
            for j in range(GROUPS):
                self._covariance[i][j] *= factors[i] * factors[j]

    def _predict(self, tokens: int, attention: float, finishing: int, per_request: float) -> tuple[float, list[float]]:
        """Seconds at the current scales, and their derivative by the logarithm of each scale."""
        compute, weights, attend, fixed = (exp(value) for value in self._log_scale)
        first = self._first
        gemm, read = compute * first.compute_s * tokens, weights * first.weights_s
        root = sqrt(gemm * gemm + read * read) or MIN_BATCH_S
        linear = compute * first.elementwise_s * tokens
        head_compute = compute * first.head_compute_s * finishing
        head_read = weights * first.head_weights_s if finishing else 0.0
        head_by_compute = head_compute >= head_read
        overhead = fixed * (first.launch_s + first.comm_s + first.comm_token_s * tokens + per_request)
        total = root + linear + attend * attention + max(head_compute, head_read) + overhead
        slope = [
            gemm * gemm / root + linear + (head_compute if head_by_compute else 0.0),
            read * read / root + (0.0 if head_by_compute else head_read),
            attend * attention,
            overhead,
        ]
        return max(total, MIN_BATCH_S), slope

    def _scaled(self) -> CostModel:
        compute, weights, attend, fixed = (exp(value) for value in self._log_scale)
        first = self._first
        return replace(
            first,
            compute_s=first.compute_s * compute,
            elementwise_s=first.elementwise_s * compute,
            head_compute_s=first.head_compute_s * compute,
            weights_s=first.weights_s * weights,
            head_weights_s=first.head_weights_s * weights,
            attention_s=first.attention_s * attend,
            kv_read_s=first.kv_read_s * attend,
            launch_s=first.launch_s * fixed,
            comm_s=first.comm_s * fixed,
            comm_token_s=first.comm_token_s * fixed,
            request_s=first.request_s * fixed,
            decode_request_s=first.decode_request_s * fixed,
        )
