"""Times engine steps over a sweep of shapes: what `lanewise profile` fits a cost model to.

Owns: which shapes are run, how often, and the medians. Must not: fit or predict anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from lanewise.engine.runner import Engine, Work
from lanewise.engine.sequence import Sequence
from lanewise.request import Sampling

LENGTHS = (1, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
CACHED = (256, 1024, 1792)
NEW_AFTER_CACHED = (16, 64, 256)
BATCHES = ((2, 32), (4, 16), (4, 64), (8, 8), (8, 32), (16, 16), (16, 32))  # prompts × tokens of each
DECODING = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 512, 1536)
MAX_TOKENS = 1024  # new tokens of one step
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """One step: prefill chunks (new, cached, finishes), or sequences that decode at this context each."""

    chunks: tuple[tuple[int, int, bool], ...] = ()
    decoding: int = 0
    context: int = 0

    @property
    def tokens(self) -> int:
        """KV slots the step needs."""
        return sum(new + cached for new, cached, _ in self.chunks) + self.decoding * (self.context + 1)


def shapes() -> Iterator[Shape]:
    """The sweep, small to large. Half of the plain lengths are also run as chunks that do not end their prompt."""
    for index, new in enumerate(LENGTHS):
        yield Shape(((new, 0, True),))
        if index % 2:
            yield Shape(((new, 0, False),))
    for cached in CACHED:
        for new in NEW_AFTER_CACHED:
            yield Shape(((new, cached, True),))
    for count, new in BATCHES:
        yield Shape(((new, 0, True),) * count)
    for count in DECODING:
        for context in CONTEXTS:
            yield Shape(decoding=count, context=context)


def measure(
    engine: Engine,
    *,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
    on_step: Callable[[int, int], None] | None = None,
) -> list[tuple[Shape, float]]:
    """Median seconds of each shape that fits this engine's context and pool; the pool is as before afterwards."""
    fitting = [shape for shape in shapes() if _fits(engine, shape)]
    times: dict[Shape, list[float]] = {shape: [] for shape in fitting}
    for shape in fitting[:3]:
        _run(engine, shape, clock)  # the first steps meet cold caches
    # Shape by shape and then again: a disturbance of some seconds touches all shapes once, not one of them always.
    for turn in range(repeats):
        for index, shape in enumerate(fitting):
            times[shape].append(_run(engine, shape, clock))
            if on_step is not None:
                on_step(turn * len(fitting) + index + 1, repeats * len(fitting))
    return [(shape, median(taken)) for shape, taken in times.items()]


def _fits(engine: Engine, shape: Shape) -> bool:
    longest = max([shape.context + 1, *(new + cached + 1 for new, cached, _ in shape.chunks)])
    new = sum(new for new, _, _ in shape.chunks)
    room = engine.pool.usage().capacity_tokens // 2
    return longest < engine.max_context_tokens and shape.tokens <= room and new <= MAX_TOKENS


def _run(engine: Engine, shape: Shape, clock: Callable[[], float]) -> float:
    """One timed step. What comes before it (cached tokens, contexts) is in the pool's pages but was never computed:
    the time of a step does not depend on the numbers in them."""
    chunks = shape.chunks or ((1, shape.context, True),) * shape.decoding
    work = []
    sampling = Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)
    try:
        for index, (new, cached, finishes) in enumerate(chunks):
            total = cached + new + (not finishes)
            ids = [(7 * i + 13 * index) % (engine.vocab_size - 1) + 1 for i in range(total)]
            seq = Sequence(("profile", index), ids, total, sampling)
            work.append(Work(seq, new))
            if not engine.pool.ensure(seq, total):
                raise RuntimeError(f"the KV pool has no room for {shape.tokens} tokens; it must be idle")
            seq.num_computed = cached
        started = clock()
        engine.step(work)
        return clock() - started
    finally:
        for item in work:
            engine.pool.release(item.seq)
