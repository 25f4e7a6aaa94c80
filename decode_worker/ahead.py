"""Steps that were launched and whose results have not been taken: with `ahead`, one of them while the next is planned.

Owns: the launches that are out, which sequences the next one may continue, what steps take and what is learned from it.
Must not: decide what is computed, or what a token means for its request (the loop does).

The host plans, launches and hands out tokens while the device computes. So a step is launched before the tokens of the
one before are known: it continues every sequence that does not end by length there. One that turns out to have ended
has been computed once too often; that result is thrown away, and its pages stay its own until the launch is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lanewise.decode_worker.room import Decode, Phase
from lanewise.policy.batching import BatchPlan, BatchPolicy
from lanewise.policy.meter import Meter, usual_step_s

if TYPE_CHECKING:
    from lanewise.engine.runner import Engine, Pending, Sampled, Work
    from lanewise.policy.refit import Chunk

MEASURED_STEPS = 10  # first ones pay for starts; fewer say nothing
KEPT_STEPS = 32


def runs_ahead(option: str, device: str) -> bool:
    """What `run_ahead` means on this device: on a CPU there is nothing to overlap with, since its cores compute."""
    return option == "always" or (option == "auto" and device != "cpu")


def goes_on(attempt: Decode) -> bool:
    """Whether the next step decodes a token of it: its newest id is there, or is being sampled and not the last."""
    seq = attempt.seq
    if not seq.num_ahead:
        return attempt.phase is Phase.RUNNING
    return not seq.num_uncomputed and not seq.ends_next


@dataclass(slots=True)
class Step:
    """One launch."""

    decoding: list[Work]
    local: list[Work]
    plan: BatchPlan
    chunks: list[Chunk]
    context_tokens: int
    launched_at: float
    pending: Pending
    over_at: float | None = None  # known at once where a launch returns when it is over


class Steps:
    def __init__(self, engine: Engine, policy: BatchPolicy, clock: Callable[[], float], *, ahead: bool) -> None:
        self._engine = engine
        self._policy = policy
        self._clock = clock
        self._ahead = ahead
        self._out: deque[Step] = deque()
        self._times: list[float] = []
        self.leaving: list[Decode] = []  # ended for the router, in a step that is out: they keep their pages
        self.meter = Meter(policy)

    def __len__(self) -> int:
        """Launches whose results have not been taken."""
        return len(self._out)

    @property
    def most_out(self) -> int:
        """So many may be out while the loop does other things."""
        return int(self._ahead)

    @property
    def decode_step_s(self) -> float:
        """What a step that only decodes takes; 0: too few were measured."""
        return usual_step_s(self._times) if len(self._times) >= MEASURED_STEPS else 0.0

    def launch(self, decoding: list[Work], plan: BatchPlan, local: list[Work], before: Callable[[], None]) -> None:
        """Launches a step of these; chunks of `plan` no longer wait. `before` is called when it is known what the step
        should take, and before it is computed: what it reports need not wait for the step."""
        chunks = [(w.num_new, w.seq.num_launched, w.num_new == w.seq.num_uncomputed) for w in local]
        context = sum(w.seq.num_launched for w in decoding)
        started = self._clock()
        if not self._out:
            self.meter.begin(chunks, started, decoding=len(decoding), context_tokens=context)
        before()
        pending = self._engine.launch([*decoding, *local], after=self._out[-1].pending if self._out else None)
        step = Step(decoding, local, plan, chunks, context, started, pending)
        if pending.done:
            step.over_at = self._clock()
        self._out.append(step)
        for item in local:
            self._policy.progress(item.seq.key, item.num_new)

    def take(self) -> list[tuple[Work, Sampled | None]]:
        """Waits for the oldest step that is out: each work of it, and what was sampled for it."""
        step = self._out.popleft()
        sampled = step.pending.result()
        self._account(step, self._clock() if step.over_at is None else step.over_at)
        return list(zip([*step.decoding, *step.local], sampled, strict=True))

    def gone(self) -> list[Decode]:
        """Those of `leaving` that no step uses any more; they are in it no longer."""
        gone = [attempt for attempt in self.leaving if not attempt.seq.num_ahead]
        if gone:
            self.leaving = [attempt for attempt in self.leaving if attempt.seq.num_ahead]
        return gone

    def _account(self, step: Step, over_at: float) -> None:
        """The device began a step when it had ended the one before: that wait is none of its time. Where the host is
        the slower one, the time that the device waited for it is."""
        self.meter.end(over_at)
        if step.local:
            if not any(later.local for later in self._out):  # else a batch still runs, for whoever comes now
                self._policy.observe(step.plan, over_at, self.meter.took_s)
        else:
            self._times = [*self._times[1 - KEPT_STEPS :], self.meter.took_s]
        if self._out:
            then = self._out[0]
            self.meter.begin(
                then.chunks,
                max(then.launched_at, over_at),
                decoding=len(then.decoding),
                context_tokens=then.context_tokens,
            )
