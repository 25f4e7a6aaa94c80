"""How many workers a demand needs: prefill by the share of prompts that would be late, decode by KV and step time.

Owns: both requirements, monotone in demand. Must not: forecast, or weigh one role against the other.

Prefill. A length-aware worker computes who can be on time first, so those who cannot behave like customers who leave:
a queue with n servers and a bound on the wait. Its loss share (M/M/n with deadline, in closed form) is the share that
will be late, times a correction that is learned from the share that was. Prompts so long that they would be late alone
wait behind all others and make nobody late. Whatever is late is still computed later, so no more than `BUSY` of the
workers' time is planned with, for all prompts together.

Decode. Sequences under way hold KV and stretch each other's steps. A worker holds as many as fit its pool and the TPOT
target; their number is random, so room is left for all but the share of moments that may be crowded, and that share
is corrected by the late TPOTs that were counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, isfinite, sqrt
from statistics import NormalDist

from lanewise.policy.cost import CostModel
from lanewise.policy.scaling_types import Demand

BUSY = 0.95  # of what workers can do at all that may be planned with
POOL = 0.95  # of a KV pool that decode admits up to
SHARING = 3  # workers that even out each other's crowds: what is placed stays where it is, so more make it no better
STEP = 0.95  # of the TPOT target that a step may take
MOST_SEQUENCES = 512.0  # a worker decodes together
CROWDED = (0.002, 0.25)  # bounds of the share of moments that may be crowded
NORMAL = NormalDist()
BATCH_SHARE = 0.12  # of the TTFT target: how long a batch of a length-aware worker lasts


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Prefill time of requests: of all on average, and of those that could be on time alone."""

    all_s: float
    mean_s: float  # of a mean request that could be
    spread: float  # variance over squared mean
    able: float = 1.0  # share of all work that is theirs


def batch_rate(cost: CostModel, ttft_s: float) -> float:
    """Seconds per uncached token in a batch of the usual size, attention aside."""
    tokens = max(int(cost.tokens_in(BATCH_SHARE * ttft_s)), int(1.5 * cost.knee_tokens), 1)
    return cost.batch(tokens, 0.0, 1, 1) / tokens


def prefill_work(cost: CostModel, ttft_s: float, shape: Demand) -> PrefillWork:
    """Work of the requests of `shape`; where a router does not tell which could be on time, all count as such."""
    if shape.requests <= 0:
        return PrefillWork(0.0, 0.0, 0.0)
    per_token = batch_rate(cost, ttft_s)
    total = per_token * shape.uncached_tokens + cost.attention_s * shape.attended + cost.request_s * shape.requests
    if total <= 0:  # too few to tell from none
        return PrefillWork(0.0, 0.0, 0.0)
    count, tokens, squares, attended = shape.able, shape.able_tokens, shape.able_squares, shape.able_attended
    if not count and shape.attainable:
        count, tokens, squares = shape.requests, shape.uncached_tokens, shape.uncached_squares
        attended = shape.attended
    if not count:
        return PrefillWork(total / shape.requests, 0.0, 0.0, 0.0)
    able = per_token * tokens + cost.attention_s * attended + cost.request_s * count
    mean = tokens / count
    spread = max(squares / count / (mean * mean) - 1, 0.0) if mean else 0.0
    return PrefillWork(total / shape.requests, able / count, spread, min(able / total, 1.0))


def late_share(workers: int, busy: float, work: PrefillWork, ttft_s: float) -> float:
    """Share of the prompts that could be on time that `workers` leave late under `busy` workers' worth of all work.

    Grows with `busy`, falls with `workers`.
    """
    busy *= work.able
    if busy <= 0:
        return 0.0
    if workers < 1:
        return 1.0
    blocked = 1.0  # Erlang B of one worker less: the chance that all others are busy
    for count in range(1, workers):
        blocked = busy * blocked / (count + busy * blocked)
    slack = max(ttft_s - work.mean_s, 0.1 * ttft_s) / work.mean_s * 2 / (1 + work.spread)
    room = workers - busy
    fade = exp(min(-room * slack, 700.0))
    waiting = slack if abs(room) < 1e-9 else (1 - fade) / room
    late = busy / workers * blocked * fade / (1 + busy * blocked * (waiting + fade / workers))
    return late if isfinite(late) else 1 - workers / busy


def prefill_workers(busy: float, work: PrefillWork, ttft_s: float, goal: float, correction: float, most: int) -> int:
    """Fewest workers with a corrected late share of at most `goal`; `most` where not even they have it."""
    if busy <= 0:
        return 0
    count = max(ceil(busy / BUSY), 1)
    while count < most and late_share(count, busy, work, ttft_s) * correction > goal:
        count += 1
    return min(count, most)


def prefill_busy(workers: int, work: PrefillWork, ttft_s: float, goal: float, correction: float) -> float:
    """The most prefill time, in workers' worth, that `workers` hold: the inverse of `prefill_workers`."""
    low, high = 0.0, BUSY * workers
    while high - low > 1e-4 * workers:
        middle = (low + high) / 2
        low, high = (middle, high) if late_share(workers, middle, work, ttft_s) * correction <= goal else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """Output tokens a second to make, the context of a mean sequence under way, and its spread."""

    tokens_per_s: float
    context_tokens: float
    spread: float  # variance over squared mean


def step_s(held: float, context_tokens: float, cost: CostModel) -> float:
    """Time of a step of `held` sequences on average (between the two whole numbers)."""
    low = int(held)
    first = cost.decode(max(low, 1), int(max(low, 1) * context_tokens))
    second = cost.decode(low + 1, int((low + 1) * context_tokens))
    return first + (held - low) * (second - first) if low else first


def most_sequences(load: DecodeLoad, cost: CostModel, capacity: int, tpot_s: float, slower: float) -> float:
    """Sequences of mean context that a worker can decode together within its pool and the TPOT target.

    `slower`: measured over expected step time. `capacity` 0: the pool is not known and does not limit.
    Who is next and does not fit yet leaves half of its own size empty, on average; long ones are next more often.
    """
    context = max(load.context_tokens, 1.0)
    fitting = POOL * capacity / context - (1 + load.spread) / 2
    low, high = 1.0, min(max(fitting, 1.0) if capacity else MOST_SEQUENCES, MOST_SEQUENCES)
    while high - low > 0.01 * low:  # the most whose step is short enough, or the whole pool
        middle = (low + high) / 2
        low, high = (middle, high) if step_s(middle, context, cost) * slower <= STEP * tpot_s else (low, middle)
    return min(low, high)


def rare(crowded: float) -> float:
    """Standard deviations that leave this share of moments crowded."""
    return -NORMAL.inv_cdf(min(max(crowded, CROWDED[0]), CROWDED[1]))


def held_sequences(workers: int, most: float, spread: float, deviations: float) -> float:
    """Mean sequences per worker at which all but rare moments stay within `most`, shared by the workers.

    Solves mean + deviations · sqrt(mean · (1 + spread) / workers) = most, for no more workers than share a crowd.
    """
    half = deviations * sqrt((1 + spread) / min(workers, SHARING)) / 2
    return max(sqrt(half * half + most) - half, 0.0) ** 2


@dataclass(frozen=True, slots=True)
class DecodeWorker:
    """One worker, and what is allowed of it."""

    cost: CostModel
    capacity: int  # tokens of its KV pool; 0: not known
    tpot_s: float
    slower: float = 1.0  # measured over expected step time
    crowded: float = 0.03  # share of moments


def decode_rate(workers: int, load: DecodeLoad, worker: DecodeWorker) -> float:
    """Output tokens a second that `workers` make within the limits."""
    most = most_sequences(load, worker.cost, worker.capacity, worker.tpot_s, worker.slower)
    return _rate(workers, load, worker, held_sequences(workers, most, load.spread, rare(worker.crowded)))


def _rate(workers: int, load: DecodeLoad, worker: DecodeWorker, held: float) -> float:
    return workers * held / (step_s(held, load.context_tokens, worker.cost) * worker.slower)


def crowded_share(workers: int, load: DecodeLoad, worker: DecodeWorker) -> float:
    """Share of moments in which there are more sequences than the workers hold."""
    if load.tokens_per_s <= 0:
        return 0.0
    if workers < 1:
        return 1.0
    most = most_sequences(load, worker.cost, worker.capacity, worker.tpot_s, worker.slower)
    mean = 0.0
    for _ in range(8):  # Little's law: as many as make the tokens, in steps that grow with their number
        mean = min(
            load.tokens_per_s / workers * step_s(mean, load.context_tokens, worker.cost) * worker.slower, 2 * most
        )
    spread = sqrt(max(mean, 1e-9) * (1 + load.spread) / min(workers, SHARING))
    return 1 - NORMAL.cdf((most - mean) / spread)


def decode_workers(load: DecodeLoad, running: float, worker: DecodeWorker, limit: int) -> int:
    """Fewest workers that make the tokens, and that hold what runs already; `limit` where not even they do."""
    if load.tokens_per_s <= 0 and running <= 0:
        return 0
    most = most_sequences(load, worker.cost, worker.capacity, worker.tpot_s, worker.slower)
    full, deviations = _rate(1, load, worker, most), rare(worker.crowded)

    def enough(count: int) -> bool:
        held = held_sequences(count, most, load.spread, deviations)
        fits = running <= max(count * held + 2 * deviations * sqrt(max(running, 0.0)), 1.0)
        made = min(_rate(count, load, worker, held), BUSY * count * full)
        return fits and load.tokens_per_s <= made

    low, high = 0, 1
    while high < limit and not enough(high):
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
