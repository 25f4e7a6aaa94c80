"""Measured against predicted: when the running batch should end, and the cost model refitted from what batches took.

Owns: the fit of one worker and the account of the batch that runs now. Must not: time anything (`now` is an argument)
or order work.
"""

from __future__ import annotations

from collections.abc import Sequence

from lanewise.policy.batching import BatchPolicy
from lanewise.policy.refit import Chunk, CostFit


class Meter:
    """Keeps `policy.cost` current. `begin` and `end` enclose every batch."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._fit = CostFit(policy.cost)
        self._chunks: Sequence[Chunk] = ()
        self._decoding = 0
        self._context_tokens = 0
        self._started_at = 0.0
        self._ends_at = 0.0
        self.took_s = 0.0  # the batch that ended last

    def begin(self, chunks: Sequence[Chunk], now: float, *, decoding: int = 0, context_tokens: int = 0) -> None:
        """A batch starts: prefill chunks (new, cached, finishes) beside `decoding` sequences of that context in all."""
        self._chunks, self._decoding, self._context_tokens = chunks, decoding, context_tokens
        cost = self._policy.cost
        predicted = cost.mixed(chunks, decoding, context_tokens) if decoding else cost.prefill(chunks)
        self._started_at, self._ends_at = now, now + predicted

    def end(self, now: float) -> None:
        """It ended. Batches of one kind are learned from; a mixed one cannot be told apart."""
        self.took_s = took_s = now - self._started_at
        if not self._decoding:
            self._fit.observe_prefill(self._chunks, took_s)
        elif not self._chunks:
            self._fit.observe_decode(self._decoding, self._context_tokens, took_s)
        self._policy.cost = self._fit.model
        self._chunks, self._decoding, self._ends_at = (), 0, now

    def wait_s(self, now: float) -> float:
        """What is left of the running batch: a new request waits at least this long."""
        return max(0.0, self._ends_at - now)

    @property
    def cost_batches(self) -> int:
        """Batches that `policy.cost` was fitted to; 0: it is the model the worker started with."""
        return self._fit.batches

    @property
    def running_tokens(self) -> int:
        """Prompt tokens in the running batch; they no longer wait."""
        return sum(new for new, _, _ in self._chunks)


def usual_step_s(seconds: Sequence[float]) -> float:
    """Mean of recent steps (at least two) but for the longest: one pause is an accident, and a CPU quota that stops a
    worker every few steps is what it can do. Their median would see neither."""
    return (sum(seconds) - max(seconds)) / (len(seconds) - 1)
