"""From what was observed to what each role needs: the requirement, before any rule bounds it.

Owns: which sums and forecasts make the requirement, the learned correction, and the words for them.
Must not: know limits, windows or budgets (`scaling.py` does).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from operator import attrgetter

from lanewise.policy.scaling_capacity import (
    DecodeLoad,
    DecodeWorker,
    PrefillWork,
    batch_rate,
    crowded_share,
    decode_workers,
    late_share,
    prefill_work,
    prefill_workers,
)
from lanewise.policy.scaling_forecast import Forecast, Sample, forecast, growth
from lanewise.policy.scaling_types import Demand, Observation, Rules, State

MIN_REQUESTS = 30  # from which lengths and contexts are taken; where fewer came, the whole history is used
BACKLOG = 10.0  # TTFT targets of work per worker that may wait: the late are served last, by design
LEAST_BACKLOG_S = 30.0
DRAIN_S = 120.0  # in which what waits beyond that is to be worked off
KEEP = 0.06  # by how much the load must fall below what a count holds before the count is given up
KEEP_ERRORS = 4.0  # and by how many standard errors of the forecast
KEEP_MOST = 0.4
CORRECTION = (0.1, 2.0)  # bounds of late shares measured over expected
SLOW_CORRECTION = (0.25, 4.0)  # of late TPOTs
PRIOR_LATE = 10.0  # requests' worth of belief in PRIOR
PRIOR = 0.6  # giving up the longest first loses fewer than the formula's random arrivals would
MEMORY_S = 3600.0  # of the correction
LEARN_FROM = 0.2  # of the late share allowed: below, the formula says too little to be judged

_VALUES = attrgetter(*(item.name for item in fields(Demand)))


@dataclass(frozen=True, slots=True)
class Need:
    """Workers each role needs, and those it may not go below yet (the margin against going to and fro)."""

    prefill: int
    decode: int
    prefill_keep: int
    decode_keep: int
    late_share: float  # that the formula, uncorrected, expects of the ready workers at the present level
    slow_share: float  # the same of TPOT
    prefill_load: float  # at the present level, in workers that are always busy
    decode_load: float  # in output tokens per second
    words: str
    facts: dict[str, float]


def need(rules: Rules, state: State, seen: Observation) -> Need:
    """The requirement for the moment when a worker asked for now would serve its first request."""
    horizon = seen.start_s + rules.period_s
    season = growth(state.season, seen.at_s, horizon)
    busy = forecast(work_samples(rules, seen, state.bins), horizon, season)
    usual = recent(state.bins, busy.window_s)
    length = _mean(usual.output_tokens, usual.finished or usual.requests)
    tokens = forecast(token_samples(state.bins, length), horizon, season)
    shape = recent(state.bins, min(busy.window_s, tokens.window_s))
    work = work_of(rules, seen, shape)
    correction, slow = correction_of(state), slow_correction_of(state)
    prefill = _prefill(rules, seen, shape, work, busy, correction)
    load, worker = decode_load(shape, tokens.value), decode_worker(rules, seen, slow)
    decode = _decode(rules, seen, load, worker, tokens)
    words = (
        f"{_rate(shape)} requests/s × {_mean(shape.uncached_tokens, shape.requests):.0f} uncached tokens keep "
        f"{busy.value:.2f} prefill workers busy in {horizon:.0f} s ({_course(busy)}); {prefill[0]} keep late prompts "
        f"under {100 * rules.late_share:g} % (correction {correction:.2f}); {tokens.value:.0f} output tokens/s at "
        f"{load.context_tokens:.0f} tokens of context ({_course(tokens)}) and {seen.running:.0f} running need "
        f"{decode[0]} decode (correction {slow:.2f})"
    )
    facts = {
        "requests_per_s": shape.requests / shape.seconds if shape.seconds else 0.0,
        "prefill_busy": busy.value,
        "output_tokens_per_s": tokens.value,
        "context_tokens": load.context_tokens,
        "correction": correction,
        "decode_correction": slow,
        "prefill_needed": float(prefill[0]),
        "decode_needed": float(decode[0]),
        "horizon_s": horizon,
    }
    expected = late_share(seen.prefill.ready, busy.level, work, rules.ttft_s) if work.all_s > 0 else 0.0
    slow_share = crowded_share(seen.decode.ready, replace(load, tokens_per_s=tokens.level), worker)
    shares, levels = (expected, slow_share), (busy.level, tokens.level)
    return Need(prefill[0], decode[0], prefill[1], decode[1], *shares, *levels, words, facts)


def recent(bins: tuple[Demand, ...], window_s: float) -> Demand:
    """The newest bins together: as long as the load has been what it is, and more where few requests came."""
    seconds = requests = 0.0
    first = len(bins)
    while first > 0 and (seconds < window_s or requests < MIN_REQUESTS):
        first -= 1
        seconds += bins[first].seconds
        requests += bins[first].requests
    return Demand(*map(sum, zip(*map(_VALUES, bins[first:]), strict=True))) if bins else Demand()


def work_of(rules: Rules, seen: Observation, shape: Demand) -> PrefillWork:
    """Prefill time of requests, as the workers' cost model has it now."""
    work = prefill_work(seen.prefill.cost, rules.ttft_s, shape)
    slower = seen.prefill.correction
    return replace(work, all_s=work.all_s * slower, mean_s=work.mean_s * slower)


def correction_of(state: State) -> float:
    """Measured over expected late share, bounded, drawn to PRIOR while little was seen."""
    share = (state.late_seen + PRIOR_LATE * PRIOR) / (state.late_expected + PRIOR_LATE)
    return min(max(share, CORRECTION[0]), CORRECTION[1])


def slow_correction_of(state: State) -> float:
    """Late TPOTs counted over crowded moments expected, bounded, drawn to 1 while little was seen."""
    share = (max(state.slow_seen, 0.0) + PRIOR_LATE) / (state.slow_expected + PRIOR_LATE)
    return min(max(share, SLOW_CORRECTION[0]), SLOW_CORRECTION[1])


def work_samples(rules: Rules, seen: Observation, bins: tuple[Demand, ...]) -> list[Sample]:
    """Prefill seconds that arrived in each bin; a request's time is taken as proportional to its uncached tokens."""
    cost, slower = seen.prefill.cost, seen.prefill.correction
    per_token = batch_rate(cost, rules.ttft_s)
    found = []
    for bin in bins:
        amount = per_token * bin.uncached_tokens + cost.attention_s * bin.attended + cost.request_s * bin.requests
        amount *= slower
        each = amount / bin.uncached_tokens if bin.uncached_tokens else 0.0
        found.append(Sample(bin.seconds, amount, each * each * bin.uncached_squares))
    return found


def token_samples(bins: tuple[Demand, ...], length: float) -> list[Sample]:
    """Output tokens of each bin, those of the refused had they been served; lengths spread like exponential ones."""
    made = [max(bin.output_tokens + (bin.refused - bin.returned) * length, 0.0) for bin in bins]
    return [Sample(bin.seconds, tokens, 2 * length * tokens) for bin, tokens in zip(bins, made, strict=True)]


def _prefill(
    rules: Rules, seen: Observation, shape: Demand, work: PrefillWork, busy: Forecast, correction: float
) -> tuple[int, int]:
    if work.all_s <= 0:
        return 0, 0
    waiting_s = max(seen.queued_tokens, 0.0) / max(_mean(shape.uncached_tokens, shape.requests), 1.0) * work.all_s
    usual_s = max(BACKLOG * rules.ttft_s, LEAST_BACKLOG_S) * max(seen.prefill.ready, 1)
    excess = max(waiting_s - usual_s, 0.0) / DRAIN_S
    loads = (busy.value + excess, (busy.value + excess) * (1 + margin(busy)))
    low, high = (
        prefill_workers(load, work, rules.ttft_s, rules.late_share, correction, _beyond(rules.prefill_max))
        for load in loads
    )
    return low, high


def decode_load(shape: Demand, tokens_per_s: float) -> DecodeLoad:
    """Sequences of the lengths of `shape`, making so many tokens."""
    prompt = _mean(shape.prompt_tokens, shape.requests)
    length = _mean(shape.output_tokens, shape.finished or shape.requests)
    context = prompt + length  # long outputs stay longest: about twice half of the mean
    spread = _mean(shape.prompt_squares, shape.requests) / (prompt * prompt) - 1 if prompt else 0.0
    return DecodeLoad(tokens_per_s, context, max(spread, 0.0))


def decode_worker(rules: Rules, seen: Observation, correction: float) -> DecodeWorker:
    role = seen.decode
    crowded = rules.late_share / correction
    return DecodeWorker(role.cost, role.kv_capacity_tokens, rules.tpot_s, role.correction, crowded)


def _decode(
    rules: Rules, seen: Observation, load: DecodeLoad, worker: DecodeWorker, tokens: Forecast
) -> tuple[int, int]:
    more = replace(load, tokens_per_s=tokens.value * (1 + margin(tokens)))
    needed, keep = (decode_workers(one, seen.running, worker, _beyond(rules.decode_max)) for one in (load, more))
    return needed, keep


def _beyond(most: int) -> int:
    """Requirements are computed past the maximum, so that a decision can say what it falls short of."""
    return 2 * most + 8


def margin(found: Forecast) -> float:
    """Share by which a load must be able to rise again before its workers are given up."""
    noise = KEEP_ERRORS * found.error / found.level if found.level > 0 else 0.0
    return min(max(noise, KEEP), KEEP_MOST)


def _mean(total: float, count: float) -> float:
    return total / count if count > 0 else 0.0


def _rate(shape: Demand) -> str:
    return f"{_mean(shape.requests, shape.seconds):.2f}"


def _course(found: Forecast) -> str:
    return f"{found.level:.4g} over {found.window_s:.0f} s, trend {100 * found.trend:+.0f} %"
