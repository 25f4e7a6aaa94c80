"""How many workers a demand needs: prefill by the share of prompts that would be late, decode by KV and step time.

Owns: both requirements, monotone in demand. Must not: forecast, or weigh one role against the other.

Prefill. A length-aware worker computes who can be on time first, so those who cannot behave like customers who leave:
a queue with n servers and a bound on the wait. Its loss share (M/M/n with deadline, in closed form) is the share that
will be late, times a correction that is learned from the share that was. Work that is late is still computed later, so
no more than `BUSY` of the workers' time is planned with.

Decode. Sequences under way hold KV and stretch each other's steps. A worker holds as many as fit its pool and the TPOT
target; their number is random, so room is left for what rarely comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, isfinite, sqrt

from lanewise.policy.cost import CostModel

BUSY = 0.95  # of prefill time that may be planned with
POOL = 0.92  # of a KV pool that may be planned with: decode admits up to .95
STEP = 0.95  # of the TPOT target that a step may take
MOST_SEQUENCES = 512.0  # a worker decodes together
RARE = 1.9  # standard deviations of KV use that must fit: three moments in a hundred are crowded
BATCH_SHARE = 0.12  # of the TTFT target: how long a batch of a length-aware worker lasts


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Prefill time of a mean request, and the spread of it."""

    mean_s: float
    spread: float  # variance over squared mean

    @property
    def square_s(self) -> float:
        return self.mean_s * self.mean_s * (1 + self.spread)


def batch_rate(cost: CostModel, ttft_s: float) -> float:
    """Seconds per uncached token in a batch of the usual size, attention aside."""
    tokens = max(int(cost.tokens_in(BATCH_SHARE * ttft_s)), int(1.5 * cost.knee_tokens), 1)
    return cost.batch(tokens, 0.0, 1, 1) / tokens


def prefill_work(
    cost: CostModel, ttft_s: float, requests: float, uncached: float, squares: float, attended: float
) -> PrefillWork:
    """Work of a mean request out of `requests` with these sums (see `Demand`)."""
    if requests <= 0:
        return PrefillWork(0.0, 0.0)
    mean = uncached * batch_rate(cost, ttft_s) + cost.attention_s * attended + cost.request_s * requests
    tokens = uncached / requests
    spread = max(squares / requests / (tokens * tokens) - 1, 0.0) if tokens else 0.0
    return PrefillWork(mean / requests, spread)


def late_share(workers: int, busy: float, work: PrefillWork, ttft_s: float) -> float:
    """Share of prompts that `workers` leave late when they offer `busy` workers' worth of prefill time.

    Grows with `busy`, falls with `workers`.
    """
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


def held_sequences(
    workers: int, load: DecodeLoad, cost: CostModel, capacity: int, tpot_s: float, slower: float
) -> float:
    """Mean sequences per worker at which all but rare moments fit the pool and the TPOT target.

    `slower`: measured over expected step time. `capacity` 0: the pool is not known and does not limit.
    """
    context = max(load.context_tokens, 1.0)
    low, high = 1.0, min(POOL * capacity / context if capacity else MOST_SEQUENCES, MOST_SEQUENCES)
    while high - low > 0.01 * low:  # the most whose step is short enough, or the whole pool
        middle = (low + high) / 2
        low, high = (middle, high) if step_s(middle, context, cost) * slower <= STEP * tpot_s else (low, middle)
    # mean + RARE · sqrt(mean · (1 + spread) / workers) = most, for a pool shared by the workers
    half = RARE * sqrt((1 + load.spread) / workers) / 2
    return max(sqrt(half * half + min(low, high)) - half, 0.0) ** 2


def decode_rate(workers: int, load: DecodeLoad, cost: CostModel, capacity: int, tpot_s: float, slower: float) -> float:
    """Output tokens a second that `workers` make within the limits."""
    held = held_sequences(workers, load, cost, capacity, tpot_s, slower)
    return workers * held / (step_s(held, load.context_tokens, cost) * slower)


def decode_workers(
    load: DecodeLoad, running: float, cost: CostModel, capacity: int, tpot_s: float, slower: float, most: int
) -> int:
    """Fewest workers that make the tokens, and that hold what runs already; `most` where not even they do."""
    if load.tokens_per_s <= 0 and running <= 0:
        return 0

    def enough(count: int) -> bool:
        held = held_sequences(count, load, cost, capacity, tpot_s, slower)
        fits = running <= max(count * held + 2 * RARE * sqrt(max(running, 0.0)), 1.0)
        return fits and load.tokens_per_s <= decode_rate(count, load, cost, capacity, tpot_s, slower)

    low, high = 0, 1
    while high < most and not enough(high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
