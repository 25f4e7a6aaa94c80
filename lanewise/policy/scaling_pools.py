"""Heterogeneous pools: the cheapest mix of workers of different GPUs that does what a decision asks for.

Owns: what a worker of a pool is worth beside a worker of the service's own profile, and the choice of the mix.
Must not: know demand over time, windows or clocks; equal arguments give equal mixes.

A decision (`scaling.py`) counts in workers of the service's own profile. A pool's worker is worth the load that such
workers hold at the same targets, over the load that the service's own hold: prefill by the share of late prompts,
decode by KV and step time. A mix covers a decision when its workers' worth adds up to it in both roles. Among the mixes
that fit the pools and both budgets the cheapest is taken; every mix is looked at, so none is cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil, floor, inf

from lanewise.policy.cost import CostModel
from lanewise.policy.scaling_capacity import DecodeLoad, DecodeWorker, PrefillWork, decode_rate, prefill_busy

STEPS = 64  # of the requirement: how finely it is cut where not all of it fits
NEAR = 1e-9


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers of one kind that either role may use. Price, GPUs and watts are those of one worker."""

    name: str
    cost: CostModel
    kv_capacity_tokens: int
    price_per_hour: float
    most: int  # workers, both roles together
    gpus: int = 1
    watts: float = 0.0


@dataclass(frozen=True, slots=True)
class Mix:
    """Workers by pool, in the order of the pools."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]

    def used(self, pool: int) -> int:
        return self.prefill[pool] + self.decode[pool]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a mix must be worth, in workers of the service's own profile, and what it may hold while it comes up.

    `present`: workers there, those on their way out left out; they hold pool and budget until others have taken over.
    `leaving`: workers on their way out. A budget of None is no limit.
    """

    prefill: float
    decode: float
    gpus: int | None = None
    watts: float | None = None
    present: Mix | None = None
    leaving: Mix | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The mix, what it costs an hour, and which share of the requirement it covers (1: all)."""

    mix: Mix
    price_per_hour: float
    share: float


Worth = tuple[tuple[float, float], ...]
"""(prefill, decode) of a worker of each pool; 0: the pool is of no use to that role."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the pools are compared by: the mean prompt of each pool, the decode load, and the targets."""

    work: tuple[PrefillWork, ...]  # of the pools; the last entry is the service's own profile
    decode: DecodeLoad
    ttft_s: float
    tpot_s: float
    late_share: float
    correction: float = 1.0


def worth(pools: Sequence[Pool], own: Pool, load: Load, prefill: int, decode: int) -> Worth:
    """What a worker of each pool is worth where the decision asks for `prefill` and `decode` of the service's own.

    Compared at equal counts, so that waiting for a free worker is shared by as many on both sides.
    """
    own_work, count_p, count_d = load.work[-1], max(prefill, 1), max(decode, 1)
    base_p, base_d = _prompts(count_p, own_work, load), _tokens(count_d, own, load)
    return tuple(
        (
            _prompts(count_p, work, load) / base_p if base_p > 0 else 0.0,
            _tokens(count_d, pool, load) / base_d if base_d > 0 else 0.0,
        )
        for pool, work in zip(pools, load.work[:-1], strict=True)
    )


def _prompts(count: int, work: PrefillWork, load: Load) -> float:
    """Prompts a second that `count` workers hold; none where a mean prompt alone takes the whole TTFT target."""
    if work.all_s <= 0 or work.mean_s >= load.ttft_s:
        return 0.0
    return prefill_busy(count, work, load.ttft_s, load.late_share, load.correction) / work.all_s


def _tokens(count: int, pool: Pool, load: Load) -> float:
    """Output tokens a second that `count` workers make; none where one mean sequence fits neither pool nor target."""
    context = max(load.decode.context_tokens, 1.0)
    if context > pool.kv_capacity_tokens or pool.cost.decode(1, int(context)) > load.tpot_s:
        return 0.0
    worker = DecodeWorker(pool.cost, pool.kv_capacity_tokens, load.tpot_s, crowded=load.late_share)
    return decode_rate(count, load.decode, worker)


# ---------------------------------------------------------------- the choice


def cheapest(pools: Sequence[Pool], value: Worth, ask: Ask, patience: float = 0.0) -> Choice:
    """The cheapest mix that covers `ask`; where none fits, the cheapest for the largest share of it that does.

    Of mixes within `patience` (a share) of the cheapest price the one that changes the fewest workers of `ask.present`
    is taken: a swap of workers costs their start-up.
    """
    share, mix = 1.0, _within(pools, value, ask, 1.0, patience)
    if mix is None:
        low, high = 0, STEPS  # what covers a requirement covers every smaller one, and no worker at all covers nothing
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _within(pools, value, ask, middle / STEPS, 0.0) else (low, middle)
        share, mix = low / STEPS, _within(pools, value, ask, low / STEPS, patience)
    assert mix is not None  # giving up everything always fits
    return Choice(mix, price_of(pools, mix), share)


def price_of(pools: Sequence[Pool], mix: Mix) -> float:
    """An hour of all its workers."""
    return sum(pool.price_per_hour * mix.used(index) for index, pool in enumerate(pools))


def fits(pools: Sequence[Pool], ask: Ask, mix: Mix) -> bool:
    """Whether pools and budgets hold at the worst moment of going from `ask.present` to `mix`.

    Where nothing grows only what stays is counted: giving up workers is always allowed.
    """
    none = Mix((0,) * len(pools), (0,) * len(pools))
    present, leaving = ask.present or none, ask.leaving or none
    pairs = ((mix.prefill, present.prefill), (mix.decode, present.decode))
    grows = any(new > old for wanted, there in pairs for new, old in zip(wanted, there, strict=True))
    gpus = watts = 0.0
    for index, pool in enumerate(pools):
        held = mix.used(index)
        if grows:
            held = sum(max(wanted[index], there[index]) for wanted, there in pairs) + leaving.used(index)
        if held > pool.most:
            return False
        gpus += held * pool.gpus
        watts += held * pool.watts
    return (ask.gpus is None or gpus <= ask.gpus + NEAR) and (ask.watts is None or watts <= ask.watts + 1e-6)


def _within(pools: Sequence[Pool], value: Worth, ask: Ask, share: float, patience: float) -> Mix | None:
    """The mix for `share` of the requirement; None where none fits."""
    prices = [pool.price_per_hour for pool in pools]
    by_role = [
        sorted(
            (sum(n * price for n, price in zip(counts, prices, strict=True)), counts)
            for counts in _covers([one[role] for one in value], [_most(pool, ask) for pool in pools], share * wanted)
        )
        for role, wanted in enumerate((ask.prefill, ask.decode))
    ]
    cheapest_price, kept = inf, None
    for price, prefill, decode in _by_price(*by_role):
        if price > cheapest_price * (1 + patience) + NEAR:
            break
        mix = Mix(prefill, decode)
        if not fits(pools, ask, mix):
            continue
        cheapest_price = min(price, cheapest_price)
        changes = _changes(ask.present, mix)
        if kept is None or changes < kept[0]:
            kept = changes, mix
    return None if kept is None else kept[1]


def _covers(value: Sequence[float], most: Sequence[int], wanted: float) -> Iterator[tuple[int, ...]]:
    """All counts that are worth `wanted`, but for those that are so without one of their workers."""

    def go(counts: tuple[int, ...], rest: float) -> Iterator[tuple[int, ...]]:
        if rest <= NEAR:
            spare = min((one for one, n in zip(value, counts, strict=False) if n), default=inf)
            if rest + spare > NEAR:
                yield (*counts, *(0,) * (len(value) - len(counts)))
            return
        if len(counts) == len(value):
            return
        one = value[len(counts)]
        enough = ceil(rest / one - NEAR) if one > 0 else 0
        for n in range(min(most[len(counts)], enough) + 1):
            yield from go((*counts, n), rest - n * one)

    return go((), wanted)


def _most(pool: Pool, ask: Ask) -> int:
    """Workers of a pool that the pool and each budget alone would allow."""
    limits = [float(pool.most)]
    if ask.gpus is not None and pool.gpus > 0:
        limits.append(ask.gpus / pool.gpus)
    if ask.watts is not None and pool.watts > 0:
        limits.append(ask.watts / pool.watts)
    return floor(min(limits) + NEAR)


Priced = list[tuple[float, tuple[int, ...]]]


def _by_price(first: Priced, second: Priced) -> Iterator[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """All pairs of two lists that are sorted by price, by the price of both together."""
    if not second:
        return
    waiting = [(price + second[0][0], index, 0) for index, (price, _) in enumerate(first)]
    heapify(waiting)
    while waiting:
        price, one, other = heappop(waiting)
        yield price, first[one][1], second[other][1]
        if other + 1 < len(second):
            heappush(waiting, (first[one][0] + second[other + 1][0], one, other + 1))


def _changes(present: Mix | None, mix: Mix) -> int:
    """Workers that come and go."""
    if present is None:
        return 0
    pairs = zip((*present.prefill, *present.decode), (*mix.prefill, *mix.decode), strict=True)
    return sum(abs(new - old) for old, new in pairs)
