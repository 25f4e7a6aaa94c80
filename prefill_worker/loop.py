"""The engine thread of a prefill worker: which prompt tokens to compute next, and their way to the decode side.

Owns: the attempts between submit and the end of their transfer, and who may use which pages meanwhile.
Must not: order work itself (the batching policy does), move bytes (the sender does) or touch sockets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import structlog

from lanewise.engine.opening import open_sequence, take_token
from lanewise.engine.runner import Work
from lanewise.fleet import Link, LinkState, WorkerStats
from lanewise.policy.batching import BatchPlan, BatchPolicy, Job
from lanewise.policy.meter import Meter
from lanewise.prefill_worker.decoys import Decoys
from lanewise.prefill_worker.overlap import Overlap
from lanewise.request import Partner, Submission
from lanewise.rpc.loop import Attempt, Key, WorkerLoop
from lanewise.rpc.outbox import Outbox
from lanewise.transfer.records import Aborted, Busy, Delivered, LinkReport, SenderEvent

if TYPE_CHECKING:
    from lanewise.engine.runner import Engine, Sampled
    from lanewise.engine.sequence import Sequence
    from lanewise.transfer.faults import Faults
    from lanewise.transfer.sender import Sender

log = structlog.get_logger(__name__)


class Phase(StrEnum):
    QUEUED = "queued"  # holds no pages
    BLOCKED = "blocked"  # wanted pages and got none; asked again when some come free
    COMPUTING = (
        "computing"  # holds pages for the whole prompt; its transfer has begun, if more than one token is wanted
    )
    SENDING = "sending"  # token 1 is out, KV is still on its way


@dataclass(slots=True, kw_only=True)
class Prefill(Attempt):
    seq: Sequence
    cache_key: bytes
    phase: Phase = Phase.QUEUED
    lent: bool = False  # the sender may read its pages: they must not be released


class PrefillLoop(WorkerLoop[Prefill]):
    def __init__(
        self,
        engine: Engine,
        policy: BatchPolicy,
        outbox: Outbox,
        faults: Faults,
        *,
        ttft_target_s: float,
    ) -> None:
        super().__init__(outbox)
        self._engine = engine
        self._policy = policy
        self._meter = Meter(policy)
        self._faults = faults
        self._ttft_target_s = ttft_target_s
        self._sender: Sender | None = None
        self._overlap: Overlap
        self._closing: dict[Key, Prefill] = {}  # ended for the router, pages still lent
        self._decoys: Decoys[Prefill] = Decoys(faults, self._free)
        self._links: dict[str, Link] = {}

    def attach_sender(self, sender: Sender) -> None:
        self._sender = sender
        self._overlap = Overlap(self._engine.pool.layout, sender, self._bandwidth)

    @property
    def sender(self) -> Sender:
        if self._sender is None:
            raise RuntimeError("attach_sender() before start()")
        return self._sender

    def on_transfer(self, event: SenderEvent) -> None:
        """Called on the transfer thread."""
        self.call(lambda: self._on_transfer(event))

    # ------------------------------------------------------------ attempts come and go

    def open(self, session: str, submission: Submission, now: float) -> Prefill:
        seq, key = open_sequence(submission, self._engine, self._engine.pool.usage().capacity_tokens)
        attempt = Prefill(
            session=session,
            submission=submission,
            arrived_at=now,
            deadline_at=now + submission.deadline_s,
            seq=seq,
            cache_key=key,
        )
        cached = self._engine.pool.match(seq.ids, key)
        self._enqueue(attempt, cached)
        self.outbox.accepted(session, attempt.key, cached)
        self._faults.point("queued")
        return attempt

    def _enqueue(self, attempt: Prefill, cached: int) -> None:
        target = attempt.submission.ttft_target_s or self._ttft_target_s
        self._policy.add(
            Job(
                key=attempt.key,
                arrival_s=attempt.arrived_at,
                remaining_tokens=len(attempt.seq.ids) - cached,
                context_tokens=cached,
                ttft_deadline_s=attempt.arrived_at + target,
            )
        )

    def close(self, attempt: Prefill, reason: str) -> None:
        self._policy.remove(attempt.key)
        if attempt.lent:
            self._closing[attempt.key] = attempt
            self.sender.abort(attempt.key, reason)
        else:
            self._release(attempt)

    def _release(self, attempt: Prefill) -> None:
        if not self._decoys.keep(attempt):
            self._free(attempt)

    def _free(self, attempt: Prefill) -> None:
        self._engine.pool.seal(attempt.seq, attempt.cache_key)
        self._engine.pool.release(attempt.seq)
        self.pages_changed_hands()
        for other in self.attempts.values():
            if other.phase is Phase.BLOCKED:
                other.phase = Phase.QUEUED
                self._enqueue(other, self._engine.pool.match(other.seq.ids, other.cache_key))

    def _on_transfer(self, event: SenderEvent) -> None:
        if isinstance(event, LinkReport):
            self._links[event.link.peer] = event.link
            return
        if not isinstance(event, Delivered | Aborted | Busy):
            return
        self._decoys.ended(event.key)
        closing = self._closing.pop(event.key, None)
        if closing is not None:
            self._release(closing)
            return
        attempt = self.attempts.get(event.key)
        if attempt is None:
            return
        attempt.lent = False
        if isinstance(event, Aborted):
            self.outbox.transfer_failed(attempt.session, event.key, event.reason, event.fingerprint_mismatch)
        elif isinstance(event, Busy):
            # The router chooses again, for free; the KV stays in this worker's cache, so little is computed twice.
            self.outbox.transfer_failed(attempt.session, event.key, "the decode side has no room", False)
        self.end(event.key, "transfer ended")

    def on_peers(self, peers: Iterable[tuple[str, str, str]]) -> None:
        known = {}
        for kv_address, incarnation, _fingerprint in peers:
            known[incarnation] = kv_address
            if incarnation not in self._links:
                self._links[incarnation] = Link(incarnation, LinkState.UNTESTED)
                self.sender.connect(Partner(kv_address, incarnation))
        self._links = {peer: link for peer, link in self._links.items() if peer in known}

    # ------------------------------------------------------------ one round

    def turn(self, now: float) -> float | None:
        self._decoys.sweep()
        while True:
            plan = self._policy.next_batch(now)
            if not plan.chunks:
                return None if plan.wait_until_s is None else max(0.001, plan.wait_until_s - now)
            work = self._admit(plan)
            if work:
                self._step(plan, work)
                return 0.0
            # Nothing of the plan could get pages; those jobs are blocked now, so the next plan is another one.

    def _admit(self, plan: BatchPlan) -> list[Work]:
        """Chunks as work. A prompt gets pages for all its tokens or none, so no two half-prompts can deadlock."""
        work = []
        for key, tokens in plan.chunks:
            attempt = self.attempts[key]  # type: ignore[index]
            if attempt.phase is Phase.QUEUED and not self._start(attempt):
                continue
            left = len(attempt.seq.ids) - attempt.seq.num_computed
            work.append(Work(attempt.seq, min(tokens, left)))
        return work

    def _start(self, attempt: Prefill) -> bool:
        pool, seq = self._engine.pool, attempt.seq
        cached = pool.attach(seq, attempt.cache_key)
        if not pool.ensure(seq, len(seq.ids)):
            pool.release(seq)
            self._policy.remove(attempt.key)
            attempt.phase = Phase.BLOCKED
            return False
        attempt.phase = Phase.COMPUTING
        self._enqueue(attempt, cached)  # the cache may have grown or shrunk since it was queued
        if attempt.seq.ends_next:
            return True  # token 1 is all of it: nobody will need its KV
        partner = attempt.submission.partner
        if partner is None:
            raise RuntimeError(f"prefill attempt {attempt.key} has no partner")
        attempt.lent = True
        shown = self._decoys.instead_of(attempt).seq  # its own, but for the fault `misbind`
        self.sender.begin(attempt.key, partner, shown.ids[: len(seq.ids)], attempt.cache_key, list(shown.pages))
        if cached:
            self.sender.ready(attempt.key, cached)
        return True

    def _step(self, plan: BatchPlan, work: list[Work]) -> None:
        started = self.clock()
        chunks = [(w.num_new, w.seq.num_computed, w.num_new == w.seq.num_uncomputed) for w in work]
        self._meter.begin(chunks, started)
        self.report()  # `accepted`, failures and the queue need not wait for the batch
        sent = (w for w in work if self.attempts[w.seq.key].lent)
        parts = ((w.seq.key, w.seq.num_computed, w.num_new) for w in sent)
        by_layer = self._overlap.begin(parts, self._meter.wait_s(started)) or self._faults.active
        sampled = self._engine.step(work, on_layers=self._on_layers if by_layer else None)
        self._overlap.computed(self._engine.pool.layout.num_layers)
        ended = self.clock()
        self._meter.end(ended)
        self._policy.observe(plan, ended, ended - started)
        for item, token in zip(work, sampled, strict=True):
            attempt = self.attempts.get(item.seq.key)
            if attempt is None:
                continue
            self._engine.pool.seal(attempt.seq, attempt.cache_key)
            self._policy.progress(attempt.key, item.num_new)
            if token is not None:
                self._first_token(attempt, token)

    def _on_layers(self, _first: int, end: int) -> None:
        self._faults.point("first_chunk_computing")
        self._overlap.computed(end)

    def _bandwidth(self, key: Key) -> float:
        partner = self.attempts[key].submission.partner
        link = self._links.get(partner.incarnation) if partner else None
        return link.bandwidth_bytes_per_s if link else 0.0

    def _first_token(self, attempt: Prefill, sampled: Sampled) -> None:
        token = take_token(attempt.seq, sampled)
        self.outbox.token(attempt.session, token)
        self._faults.point("token1_sent")
        if token.finish is None:
            attempt.phase = Phase.SENDING
            self.sender.commit(attempt.key, token)
        else:
            self.end(attempt.key, "finished at token 1")

    # ------------------------------------------------------------ statistics

    def audit(self) -> list[str]:
        return self._engine.pool.audit([])

    @property
    def idle(self) -> bool:
        return not self.attempts and not self._closing and not self._decoys

    def publish(self, now: float) -> None:
        pool = self._engine.pool
        usage = pool.usage()
        jobs = self._policy.jobs.values()
        queued = sum(job.remaining_tokens for job in jobs) - self._meter.running_tokens
        cost = self._policy.cost
        self.outbox.blocks(*pool.take_events())
        self.outbox.stats(
            WorkerStats(
                queued_requests=len(self._policy.jobs),
                queued_tokens=max(0, queued),
                kv_used_tokens=usage.used_tokens,
                kv_capacity_tokens=usage.capacity_tokens,
                kv_cached_tokens=usage.cached_tokens,
                queue_wait_s=round(self._meter.wait_s(now), 4),
                drain_eta_s=round(self._meter.wait_s(now) + max(0, queued) * cost.token_s, 1),
                cost=cost.to_mapping(),
                cost_batches=self._meter.cost_batches,
                lane=self.lane,
                lane_generation=self.lane_generation,
                lane_age_s=round(now - self.lane_moved_at, 1),
                draining=self.draining,
                links=tuple(self._links.values()),
                transfers=sum(a.lent for a in self.attempts.values()) + len(self._closing),
                leaked_blocks=self.leaked_blocks,
                counters=asdict(self.sender.snapshot()),
            )
        )
