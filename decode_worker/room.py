"""Room in the KV pool of a decode worker: who may take pages, and who gives them back when there are none.

Owns: decode admission by predicted peak (the Past-Future rule), the choice whom to preempt, and the account of both.
Must not: change an attempt or touch the pool; the loop acts on what is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from lanewise.fleet import WorkerStats
from lanewise.policy.admission import OutputLengths, peak_tokens
from lanewise.policy.batching import BatchPolicy
from lanewise.rpc.loop import Attempt

if TYPE_CHECKING:
    from lanewise.engine.pages import PoolUsage as Usage
    from lanewise.engine.sequence import Sequence as EngineSequence


class Phase(StrEnum):
    EXPECTED = "expected"  # waits for BEGIN, holds no pages
    OFFERED = "offered"  # BEGIN came and there was no room yet
    RECEIVING = "receiving"  # pages are lent to the receiver
    QUEUED = "queued"  # local prefill, holds no pages
    BLOCKED = "blocked"  # local prefill that found no room; asked again when some comes free
    PREFILLING = "prefilling"  # local prefill, holds pages for all its ids
    RUNNING = "running"  # decodes one token a step


@dataclass(slots=True, kw_only=True)
class Decode(Attempt):
    seq: EngineSequence
    cache_key: bytes
    phase: Phase
    preempted: bool = False  # recomputed ahead of new admissions
    refuse_at: float = 0.0  # an offer that found no room by then is refused


class Admission:
    def __init__(self, capacity_tokens: int, max_running: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._max_running = max_running
        self._outputs = OutputLengths()

    def observe(self, output_tokens: int) -> None:
        """A request ended with this many output tokens."""
        self._outputs.observe(output_tokens)

    def fits(self, candidate: Decode, attempts: Iterable[Decode]) -> bool:
        """Whether the predicted peak of all that hold pages, with the candidate, stays within the pool.

        Alone it always fits: what could never fit was refused at submit.
        """
        held = [a for a in attempts if a.seq.pages]
        if not held:
            return True
        if len(held) >= self._max_running:
            return False
        load = [(len(a.seq.ids), self.remaining(a)) for a in [*held, candidate]]
        return peak_tokens(load) <= self._capacity_tokens

    def remaining(self, attempt: Decode) -> int:
        """Predicted output tokens to come."""
        return max(1, self._outputs.remaining(attempt.seq.num_output, attempt.seq.sampling.max_tokens))


def victim(attempts: Iterable[Decode]) -> Decode:
    """The request with the least progress; among equals the one that came last. There must be one that can yield."""
    return min(
        (a for a in attempts if a.phase in (Phase.RUNNING, Phase.PREFILLING)),
        key=lambda a: (a.seq.num_output, -a.arrived_at),
    )


def first_come(attempts: Iterable[Decode], phase: Phase) -> Sequence[Decode]:
    """All in this phase, preempted ones first, then in order of arrival."""
    return sorted((a for a in attempts if a.phase is phase), key=lambda a: (not a.preempted, a.arrived_at))


def with_load(
    stats: WorkerStats,
    attempts: Iterable[Decode],
    usage: Usage,
    policy: BatchPolicy,
    closing: int,
    admission: Admission,
) -> WorkerStats:
    """The same statistics with what the pool holds, what runs and what waits."""
    attempts = list(attempts)
    running = [a for a in attempts if a.phase is Phase.RUNNING]
    queued = sum(job.remaining_tokens for job in policy.jobs.values())
    steps = max((admission.remaining(a) for a in attempts), default=0)
    drain_eta_s = stats.queue_wait_s + queued * policy.cost.token_s + steps * stats.decode_step_s
    return replace(
        stats,
        queued_requests=len(policy.jobs),
        queued_tokens=queued,
        running_requests=len(running),
        running_context_tokens=sum(len(a.seq.ids) for a in running),
        kv_used_tokens=usage.used_tokens,
        kv_capacity_tokens=usage.capacity_tokens,
        kv_cached_tokens=usage.cached_tokens,
        cost=policy.cost.to_mapping(),
        drain_eta_s=round(drain_eta_s, 1),
        transfers=sum(a.phase is Phase.RECEIVING for a in attempts) + closing,
    )
