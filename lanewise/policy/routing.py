"""Which prefill and decode worker serve a request: a pure choice over one fleet snapshot.

Owns: eligibility of pairs, the score in seconds, and the choice between remote and local prefill.
Must not: keep state, read clocks, draw random numbers or talk to workers. Equal arguments give equal pairs; `seed` is
the router's request counter and the only source of variety.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Literal

from lanewise.fleet import FleetSnapshot, Lane, Link, LinkState, Pair, WorkerView
from lanewise.policy.baseline_routing import BASELINES, mix, worker_cost
from lanewise.policy.cost import CostModel

SAMPLED = 4  # candidates scored by one of several routers, so that they do not herd to the same worker
SAMPLE_FROM = 16  # prefill workers from which on a router samples; below, scoring all costs nothing

FULL_BATCH = 0.1  # of the TTFT target: how long a batch of the worker lasts, a little below sizing.QUANTUM
AHEAD = 4.0  # queued work that a prompt waits for, in multiples of its own length
BACKLOG = 0.05  # weight of the rest of the queue

ROUTE_NAMES = ("lanewise", *BASELINES)


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What the choice depends on. `cached_tokens` holds the prefix hit by incarnation, of either role."""

    prompt_tokens: int
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    ttft_target_s: float = 0.4
    disaggregation: Literal["Auto", "Always", "Never"] = "Auto"
    tpot_target_s: float = 0.05
    max_tokens: int = 1
    exclude: frozenset[str] = frozenset()
    kv_bytes_per_token: int = 0  # 0: transfer time is not predicted
    length_cuts: tuple[int, ...] = ()  # for `buckets`: ascending uncached lengths between the instances
    lane: Lane = Lane.ANY  # of the request; instances of the other lane are used only where there is no other
    sampled: bool = False  # one of several routers: score a sample of a large fleet


def choose_pair(
    request: RouteRequest, fleet: FleetSnapshot, now: float, seed: int, policy: str = "lanewise"
) -> Pair | None:
    """The pair with the least predicted TTFT + TPOT penalty; None when no worker can take the request.

    `Pair.prefill is None`: prefill locally on the decode worker, because the service says `Never`, because no prefill
    worker may be paired with one, or because `Auto` predicts it to be no slower.
    """
    if policy not in ROUTE_NAMES:
        raise ValueError(f"unknown routing policy {policy!r}; known: {', '.join(ROUTE_NAMES)}")
    able = [view for view in fleet.decode if _eligible(view, request)]
    costs = _device_costs(request, fleet.decode)
    decodes = [(_decode_penalty(request, view, costs[view.identity.device]), view) for view in able]
    if not decodes:
        return None
    decodes.sort(key=lambda item: item[0])
    local = _best_local(request, decodes)
    if request.disaggregation == "Never":
        return local[1]
    remote = _best_remote(request, decodes, fleet, seed, policy)
    if remote is None:
        return local[1]
    chosen, other = (remote, local) if request.disaggregation == "Always" or remote[0] < local[0] else (local, remote)
    return replace(chosen[1], other_ttft_s=other[1].predicted_ttft_s)


def predicted_ttft(view: WorkerView, new: int, cached: int, cost: CostModel, target_s: float) -> float:
    """Time to the first token of a prompt with `new` uncached tokens: what is left of the running batch, then its own
    batches, with the queued work that goes before it or beside it.

    The worker computes shorter work first, so a prompt waits for a few times its own length at most, however long the
    queue is (`AHEAD`); a small share of the whole queue still counts, since late prompts wait for all of it.
    """
    running = view.stats.queue_wait_s
    # A worker makes no batch that takes longer to begin than to compute, whatever its model has come to think.
    least = (cost.weights_s + cost.launch_s) / max(cost.compute_s, 1e-12)
    full = max(cost.tokens_in(FULL_BATCH * target_s), least, 1.0)
    rate = cost.batch(int(full), 0.0, 0, 1) / int(full)
    waiting = view.stats.queued_tokens + view.inflight_tokens
    total = min(waiting, max(AHEAD * new, full - new)) + new
    own = cost.batch(int(min(total, full)), 0.0, 1, 1) + max(total - full, 0.0) * rate + cost.attention(new, cached)
    if running + own > target_s:  # it will be late, and the late are served by arrival: it waits for all of them
        own += max(waiting - total + new, 0.0) * rate
    return running + own + BACKLOG * waiting * rate


def _eligible(view: WorkerView, request: RouteRequest) -> bool:
    identity = view.identity
    return (
        view.ready
        and not view.stats.draining
        and identity.incarnation not in request.exclude
        and request.prompt_tokens < identity.max_context_tokens
        and request.prompt_tokens <= identity.kv_capacity_tokens
    )


def _link(prefill: WorkerView, decode: WorkerView) -> Link | None:
    """The KV path of the pair; None where the two may not be paired at all."""
    if prefill.identity.fingerprint != decode.identity.fingerprint:
        return None
    for link in prefill.stats.links:
        if link.peer == decode.identity.incarnation:
            return None if link.state is LinkState.FAILED else link
    return Link(decode.identity.incarnation, LinkState.UNTESTED)


def _uncached(request: RouteRequest, view: WorkerView) -> int:
    """At least one token is always computed: the one whose logits give the first output token."""
    return max(request.prompt_tokens - request.cached_tokens.get(view.identity.incarnation, 0), 1)


def _decode_penalty(request: RouteRequest, view: WorkerView, cost: CostModel) -> float:
    """Seconds of TTFT that one more sequence here is worth: steps beyond the TPOT target, and a pool near its end.

    Below the target the slope is small but not zero, so that load spreads before it hurts. `cost`: of its device. A
    worker that is slower than its like shows it in the steps that it measures while it decodes.
    """
    stats = view.stats
    running = stats.running_requests + view.inflight_requests + 1
    context = stats.running_context_tokens + view.inflight_tokens + request.prompt_tokens
    step = cost.decode(running, context)
    if stats.running_requests:
        step = max(step, stats.decode_step_s)
    late = max(step - request.tpot_target_s, 0.0) * request.max_tokens
    capacity = max(stats.kv_capacity_tokens or view.identity.kv_capacity_tokens, 1)
    full = max((stats.kv_used_tokens + view.inflight_tokens + request.prompt_tokens) / capacity - 0.9, 0.0)
    return 0.1 * step + late + full * 10 * request.ttft_target_s


def _device_costs(request: RouteRequest, fleet: Sequence[WorkerView]) -> dict[str, CostModel]:
    """By device: the model that its decode workers are compared by. The middle of those that were fitted; the fastest
    where none was.

    One for all, since one sequence more takes less time than the fits of two equal workers differ by: by its own each
    crowd of requests would go to the same worker, and an idle one with a bad fit would get none to correct it by.
    """
    found: dict[str, list[tuple[float, int, CostModel]]] = {}
    for view in fleet:
        cost = worker_cost(view)
        step = cost.decode(1, request.prompt_tokens)
        found.setdefault(view.identity.device, []).append((step, view.stats.cost_batches, cost))
    chosen: dict[str, CostModel] = {}
    for device, costs in found.items():
        costs.sort(key=itemgetter(0))
        fitted = [cost for _, batches, cost in costs if batches]
        chosen[device] = fitted[len(fitted) // 2] if fitted else costs[0][2]
    return chosen


def _transfer(request: RouteRequest, link: Link, decode: WorkerView, own_s: float) -> float:
    """Transfer time that computing does not hide: layers travel while later ones are computed."""
    if not request.kv_bytes_per_token or link.bandwidth_bytes_per_s <= 0:
        return link.latency_s
    missing = request.prompt_tokens - request.cached_tokens.get(decode.identity.incarnation, 0)
    return link.latency_s + max(missing * request.kv_bytes_per_token / link.bandwidth_bytes_per_s - own_s, 0.0)


def _best_local(request: RouteRequest, decodes: Sequence[tuple[float, WorkerView]]) -> tuple[float, Pair]:
    """Local prefill, chunked between decode steps: it takes longer and slows the steps of those who decode there."""
    best: tuple[float, str, Pair] | None = None
    for penalty, view in decodes:
        cost, new = worker_cost(view), _uncached(request, view)
        own = cost.alone(new, request.prompt_tokens - new)
        ttft = predicted_ttft(view, new, request.prompt_tokens - new, cost, request.ttft_target_s)
        disturbed = view.stats.running_requests * own / max(request.max_tokens, 1)
        score = ttft + penalty + disturbed
        if best is None or (score, view.identity.incarnation) < best[:2]:
            reason = f"local: prefill {own * 1e3:.0f} ms, waiting {max(ttft - own, 0) * 1e3:.0f} ms"
            best = (score, view.identity.incarnation, Pair(None, view.identity.incarnation, ttft, reason))
    assert best is not None  # the caller has at least one decode worker
    return best[0], best[2]


def _best_remote(
    request: RouteRequest,
    decodes: Sequence[tuple[float, WorkerView]],
    fleet: FleetSnapshot,
    seed: int,
    policy: str,
) -> tuple[float, Pair] | None:
    candidates = []
    for prefill in fleet.prefill:
        if _eligible(prefill, request):
            links = ((penalty, decode, _link(prefill, decode)) for penalty, decode in decodes)
            partner = next(((penalty, decode, link) for penalty, decode, link in links if link is not None), None)
            if partner is not None:
                candidates.append((prefill, *partner))
    if not candidates:
        return None
    if request.lane is not Lane.ANY:
        candidates = [c for c in candidates if c[0].stats.lane in (request.lane, Lane.ANY)] or candidates
    if policy != "lanewise":
        lengths = [_uncached(request, item[0]) for item in candidates]
        index = BASELINES[policy]([item[0] for item in candidates], lengths, request, seed)
        candidates = [candidates[index]]
    elif request.sampled and len(candidates) > SAMPLE_FROM:
        candidates = [candidates[index] for index in sorted({mix(seed, i) % len(candidates) for i in range(SAMPLED)})]
    best: tuple[float, int, Pair] | None = None
    for place, (prefill, penalty, decode, link) in enumerate(candidates):
        cost, new = worker_cost(prefill), _uncached(request, prefill)
        own = cost.alone(new, request.prompt_tokens - new)
        ttft = predicted_ttft(prefill, new, request.prompt_tokens - new, cost, request.ttft_target_s)
        score = ttft + penalty + _transfer(request, link, decode, own)
        turn = (place - seed) % len(candidates)  # equal scores take turns
        if best is None or (score, turn) < best[:2]:
            reason = f"{policy}: prefill {own * 1e3:.0f} ms, waiting {max(ttft - own, 0) * 1e3:.0f} ms"
            best = (score, turn, Pair(prefill.identity.incarnation, decode.identity.incarnation, ttft, reason))
    assert best is not None
    return best[0], best[2]
