"""Routing rules others use, kept runnable for comparison.

Owns: each rule as a pure choice among eligible prefill workers, and the cut of lengths into buckets.
Must not: be improved, or look at anything the published rule does not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lanewise.fleet import WorkerView
from lanewise.policy.cost import CostModel

if TYPE_CHECKING:
    from lanewise.policy.routing import RouteRequest

BALANCE_ABS = 64  # SGLang's cache-aware rule: beyond both imbalances it balances instead of seeking the cache
BALANCE_REL = 1.5
CACHE_THRESHOLD = 0.3
BUCKET_IMBALANCE = 2048  # tokens of difference from which `buckets` balances instead
RECUT_S = 5.0


def mix(seed: int, salt: int = 0) -> int:
    """A 64-bit hash (splitmix64): spreads consecutive seeds, so a counter serves as a source of choices."""
    value = (seed * 0x9E3779B97F4A7C15 + salt * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return value ^ (value >> 31)


_MODELS: dict[int, tuple[Mapping[str, float], CostModel]] = {}
_MAX_MODELS = 4096


def worker_cost(view: WorkerView) -> CostModel:
    """The worker's fitted cost model, as it advertises it. Built once for each `stats.cost`, which never changes."""
    coefficients = view.stats.cost
    known = _MODELS.get(id(coefficients))
    if known is not None and known[0] is coefficients:  # the entry keeps it alive, so an id is not used again
        return known[1]
    if len(_MODELS) >= _MAX_MODELS:
        _MODELS.clear()
    model = CostModel.from_mapping(coefficients)
    _MODELS[id(coefficients)] = (coefficients, model)
    return model


def load_tokens(view: WorkerView) -> float:
    """Tokens not computed yet, what is left of the running batch included."""
    running = view.stats.queue_wait_s / worker_cost(view).token_s
    return view.stats.queued_tokens + view.inflight_tokens + running


def load_requests(view: WorkerView) -> int:
    return view.stats.queued_requests + view.inflight_requests


def _random(views: Sequence[WorkerView], lengths: Sequence[int], request: RouteRequest, seed: int) -> int:
    return mix(seed) % len(views)


def _round_robin(views: Sequence[WorkerView], lengths: Sequence[int], request: RouteRequest, seed: int) -> int:
    return seed % len(views)


def _power_of_two(views: Sequence[WorkerView], lengths: Sequence[int], request: RouteRequest, seed: int) -> int:
    """Two at random; the one with fewer queued tokens, else fewer requests."""
    first = mix(seed) % len(views)
    second = (first + 1 + mix(seed, 1) % (len(views) - 1)) % len(views) if len(views) > 1 else first
    return min((first, second), key=lambda i: (load_tokens(views[i]), load_requests(views[i])))


def _least_work(views: Sequence[WorkerView], lengths: Sequence[int], request: RouteRequest, seed: int) -> int:
    return min(range(len(views)), key=lambda i: (load_tokens(views[i]) + lengths[i], (i - seed) % len(views)))


def _cache_aware(views: Sequence[WorkerView], lengths: Sequence[int], request: RouteRequest, seed: int) -> int:
    """SGLang: balance when unbalanced, else the best prefix if it covers enough, else the smallest cache."""
    loads = [load_requests(view) for view in views]
    if max(loads) - min(loads) > BALANCE_ABS and max(loads) > BALANCE_REL * min(loads):
        return loads.index(min(loads))
    best = min(range(len(views)), key=lambda i: lengths[i])
    if 1 - lengths[best] / max(request.prompt_tokens, 1) > CACHE_THRESHOLD:
        return best
    return min(range(len(views)), key=lambda i: (views[i].stats.kv_cached_tokens, (i - seed) % len(views)))


def _buckets(views: Sequence[WorkerView], lengths: Sequence[int], request: RouteRequest, seed: int) -> int:
    """SGLang `bucket`: one length range per instance; least loaded when loads are far apart."""
    loads = [load_tokens(view) for view in views]
    if max(loads) - min(loads) > BUCKET_IMBALANCE and max(loads) > BALANCE_REL * min(loads):
        return loads.index(min(loads))
    return min(bisect_left(request.length_cuts, min(lengths)), len(views) - 1)


BASELINES: dict[str, Callable[[Sequence[WorkerView], Sequence[int], RouteRequest, int], int]] = {
    "random": _random,
    "round-robin": _round_robin,
    "power-of-two": _power_of_two,
    "least-work": _least_work,
    "cache-aware": _cache_aware,
    "buckets": _buckets,
}


class LengthBuckets:
    """Cuts of recent lengths that give each instance an equal share of tokens, made anew every 5 s."""

    def __init__(self, window: int = 2000) -> None:
        self._recent: deque[int] = deque(maxlen=window)
        self._cuts: tuple[int, ...] = ()
        self._cut_at = -RECUT_S

    def observe(self, uncached_tokens: int, instances: int, now: float) -> tuple[int, ...]:
        """A request arrived: the cuts to route it by."""
        self._recent.append(uncached_tokens)
        if now - self._cut_at >= RECUT_S or len(self._cuts) != instances - 1:
            self._cut_at = now
            cuts: list[int] = []
            total, seen = sum(self._recent), 0
            for length in sorted(self._recent):
                seen += length
                while len(cuts) < instances - 1 and seen >= total * (len(cuts) + 1) / instances:
                    cuts.append(length)
            self._cuts = tuple(cuts)
        return self._cuts
