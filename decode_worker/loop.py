"""The engine thread of a decode worker: continuous batching, arriving KV, local prefill and preemption.

Owns: the attempts from submit to their last token, and who may use which pages meanwhile.
Must not: order local prefill itself (the batching policy does), verify KV (the receiver does) or touch sockets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import structlog

from lanewise.decode_worker.ahead import Steps, goes_on
from lanewise.decode_worker.room import Admission, Decode, Phase, first_come, victim, with_load
from lanewise.engine.opening import open_sequence, take_token
from lanewise.engine.runner import Work
from lanewise.fleet import WorkerStats
from lanewise.policy.batching import BatchPlan, BatchPolicy, Job
from lanewise.policy.beside import beside_decoding
from lanewise.request import Mode, Submission
from lanewise.rpc.loop import Key, WorkerLoop
from lanewise.rpc.outbox import Outbox
from lanewise.transfer.records import Aborted, Committed, Offered, ReceiverEvent

if TYPE_CHECKING:
    from lanewise.engine.runner import Engine, Sampled
    from lanewise.transfer.faults import Faults
    from lanewise.transfer.receiver import Receiver

log = structlog.get_logger(__name__)

OFFER_PATIENCE_S = 4.0  # an offer may wait this long for room; the sender gives up after 5 s


class DecodeLoop(WorkerLoop[Decode]):
    def __init__(
        self,
        engine: Engine,
        policy: BatchPolicy,
        receiver: Receiver,
        outbox: Outbox,
        faults: Faults,
        *,
        max_running: int,
        ttft_target_s: float,
        ahead: bool = False,
    ) -> None:
        """`ahead`: a step is launched before the result of the one before is taken."""
        super().__init__(outbox)
        self._engine = engine
        self._policy = policy
        self._steps = Steps(engine, policy, self.clock, ahead=ahead)
        self._faults = faults
        self._max_running, self._max_batch_tokens = max_running, policy.max_batch_tokens
        self._admission = Admission(engine.pool.usage().capacity_tokens, max_running)
        self._ttft_target_s = ttft_target_s
        self.receiver = receiver
        self._closing: dict[Key, Decode] = {}  # ended for the router, pages still lent to the receiver
        self._preemptions = 0

    def on_transfer(self, event: ReceiverEvent) -> None:
        """Called on the transfer thread."""
        self.call(lambda: self._on_transfer(event))

    # ------------------------------------------------------------ attempts come and go

    def open(self, session: str, submission: Submission, now: float) -> Decode:
        seq, key = open_sequence(submission, self._engine, self._engine.pool.usage().capacity_tokens)
        attempt = Decode(
            session=session,
            submission=submission,
            arrived_at=now,
            deadline_at=now + submission.deadline_s,
            seq=seq,
            cache_key=key,
            phase=Phase.EXPECTED if submission.mode is Mode.DECODE else Phase.QUEUED,
        )
        cached = self._engine.pool.match(seq.ids, key)
        if attempt.phase is Phase.EXPECTED:
            self.receiver.expect(attempt.key, seq.ids, key)
        else:
            self._enqueue(attempt)
        self.outbox.accepted(session, attempt.key, cached)
        return attempt

    def _enqueue(self, attempt: Decode) -> None:
        """Queue local prefill of all ids that are not cached."""
        seq = attempt.seq
        started = attempt.phase is Phase.PREFILLING
        cached = seq.num_computed if started else self._engine.pool.match(seq.ids, attempt.cache_key)
        target = attempt.submission.ttft_target_s or self._ttft_target_s
        # A preempted request has already waited its turn once: its arrival puts it before all that came later.
        self._policy.add(
            Job(attempt.key, attempt.arrived_at, len(seq.ids) - cached, cached, attempt.arrived_at + target)
        )

    def close(self, attempt: Decode, reason: str) -> None:
        self._policy.remove(attempt.key)
        if attempt.phase in (Phase.EXPECTED, Phase.OFFERED, Phase.RECEIVING):
            self._closing[attempt.key] = attempt
            self.receiver.cancel(attempt.key, reason)
        elif attempt.seq.num_ahead:
            self._steps.leaving.append(attempt)
        else:
            self._release(attempt)

    def _release(self, attempt: Decode) -> None:
        if attempt.phase in (Phase.PREFILLING, Phase.RUNNING):
            self._engine.pool.seal(attempt.seq, attempt.cache_key)
        self._engine.pool.release(attempt.seq)
        self.pages_changed_hands()
        for other in first_come(self.attempts.values(), Phase.BLOCKED):
            other.phase = Phase.QUEUED
            self._enqueue(other)

    # ------------------------------------------------------------ KV arrives

    def _on_transfer(self, event: ReceiverEvent) -> None:
        attempt = self.attempts.get(event.key)
        if attempt is None:
            self._on_late(event)
            return
        match event:
            case Offered():
                self._faults.point("grant_pending")
                attempt.phase, attempt.refuse_at = Phase.OFFERED, self.clock() + OFFER_PATIENCE_S
            case Committed():
                self._committed(attempt, event)
            case Aborted():
                self.outbox.transfer_failed(attempt.session, event.key, event.reason, event.fingerprint_mismatch)
                attempt.phase = Phase.QUEUED  # the receiver is done with its pages
                self.end(event.key, event.reason)

    def _on_late(self, event: ReceiverEvent) -> None:
        """An event of an attempt that ended meanwhile."""
        if isinstance(event, Offered):
            self.receiver.refuse(event.key, False, "the request has ended")
        elif closing := self._closing.pop(event.key, None):
            closing.phase = Phase.QUEUED  # what arrived of it was never verified as a whole: not for the cache
            self._release(closing)

    def _answer_offers(self, now: float) -> float | None:
        """Grant in order of arrival while there is room. Returns when the next offer runs out of patience."""
        waiting = first_come(self.attempts.values(), Phase.OFFERED)
        for index, attempt in enumerate(waiting):
            if self._grant(attempt):
                continue
            if attempt.refuse_at <= now:
                self.receiver.refuse(attempt.key, True, "no room in the KV pool")
                self.outbox.transfer_failed(attempt.session, attempt.key, "no room in the KV pool", False)
                attempt.phase = Phase.QUEUED  # the receiver has forgotten it
                self.end(attempt.key, "no room")
                continue
            return min(a.refuse_at for a in waiting[index:]) - now
        return None

    def _grant(self, attempt: Decode) -> bool:
        pool, seq = self._engine.pool, attempt.seq
        if not self._admission.fits(attempt, self.attempts.values()):
            return False
        have = pool.attach(seq, attempt.cache_key)
        if not pool.ensure(seq, len(seq.ids)):
            pool.release(seq)
            return False
        attempt.phase = Phase.RECEIVING
        self.receiver.grant(attempt.key, list(seq.pages), have)
        return True

    def _committed(self, attempt: Decode, event: Committed) -> None:
        seq = attempt.seq
        seq.num_computed = len(seq.ids)
        self._engine.pool.seal(seq, attempt.cache_key)
        seq.ids.append(event.token.token_id)
        attempt.phase = Phase.RUNNING
        self.outbox.committed(attempt.session, attempt.key, event.received_tokens, event.received_bytes)
        self._faults.point("committed")

    def on_peers(self, peers: Iterable[tuple[str, str, str]]) -> None:
        """Decode workers are connected to; they connect to no one."""

    # ------------------------------------------------------------ one round

    def turn(self, now: float) -> float | None:
        patience = self._answer_offers(now)
        work, most = self._decode_work(), self._max_batch_tokens
        if work is None:
            self._take()  # planned again then, with nothing out
            return 0.0
        self._policy.max_batch_tokens = beside_decoding(self._policy.cost, most) if work else most
        plan = self._policy.next_batch(now)
        local = self._local_work(plan)
        if work or local:
            self._steps.launch(work, plan, local, before=self.report)
            while len(self._steps) > self._steps.most_out:
                self._take()
            return 0.0
        if self._steps:
            self._take()
            return 0.0
        wait = None if plan.wait_until_s is None else plan.wait_until_s - now
        waits = [w for w in (wait, patience) if w is not None]
        return max(0.001, min(waits)) if waits else None

    def _preempt(self) -> None:
        """Take the pages of the request with the least progress; it is computed again, ids kept, when there is room."""
        loser = victim(self.attempts.values())
        self._preemptions += 1
        log.info("preempted", request_id=loser.key[0], epoch=loser.key[1], output_tokens=loser.seq.num_output)
        self._policy.remove(loser.key)
        self._engine.pool.seal(loser.seq, loser.cache_key)
        self._engine.pool.release(loser.seq)
        loser.preempted = True
        loser.phase = Phase.QUEUED
        self._enqueue(loser)

    def _decode_work(self) -> list[Work] | None:
        """A token of each that decodes. None: a step that is out must end before there are pages for all."""
        going = [attempt for attempt in self.attempts.values() if goes_on(attempt)]
        for attempt in going:
            while goes_on(attempt) and not self._engine.pool.ensure(attempt.seq, attempt.seq.num_launched + 1):
                if self._steps:
                    return None
                self._preempt()
        return [Work(attempt.seq, 1) for attempt in going if goes_on(attempt)][: self._max_running]

    def _local_work(self, plan: BatchPlan) -> list[Work]:
        """Chunks of local prefill beside the decode step. A prompt gets pages for all its ids or none."""
        work = []
        for key, tokens in plan.chunks:
            attempt = self.attempts[key]  # type: ignore[index]
            if attempt.phase is Phase.QUEUED and not self._start(attempt):
                continue
            work.append(Work(attempt.seq, min(tokens, attempt.seq.num_uncomputed)))
        return work

    def _start(self, attempt: Decode) -> bool:
        waiting = any(a.preempted and a.phase in (Phase.QUEUED, Phase.BLOCKED) for a in self.attempts.values())
        pool, seq = self._engine.pool, attempt.seq
        if (attempt.preempted or not waiting) and self._admission.fits(attempt, self.attempts.values()):
            pool.attach(seq, attempt.cache_key)
            if pool.ensure(seq, len(seq.ids)):
                attempt.phase = Phase.PREFILLING
                attempt.preempted = False
                self._enqueue(attempt)  # the cache may have grown or shrunk since it was queued
                return True
            pool.release(seq)
        self._policy.remove(attempt.key)
        attempt.phase = Phase.BLOCKED
        return False

    def _take(self) -> None:
        """The tokens of the oldest step that is out. Whoever ended since it was launched gets none."""
        for item, token in self._steps.take():
            attempt = self.attempts.get(item.seq.key)
            if attempt is None:
                continue
            if attempt.phase is Phase.PREFILLING:
                self._engine.pool.seal(attempt.seq, attempt.cache_key)
            if token is not None:
                attempt.phase = Phase.RUNNING
                self._token(attempt, token)
        for attempt in self._steps.gone():
            self._release(attempt)

    def _token(self, attempt: Decode, sampled: Sampled) -> None:
        token = take_token(attempt.seq, sampled)
        self.outbox.token(attempt.session, token)
        self._faults.point("token_sent")
        if token.finish is not None:
            self._admission.observe(attempt.seq.num_output)
            self.end(attempt.key, token.finish.value)

    # ------------------------------------------------------------ statistics

    def audit(self) -> list[str]:
        return self._engine.pool.audit([])

    @property
    def idle(self) -> bool:
        return not self.attempts and not self._closing and not self._steps.leaving

    def publish(self, now: float) -> None:
        pool = self._engine.pool
        self.outbox.blocks(*pool.take_events())
        fleet = WorkerStats(
            lane=self.lane,
            lane_generation=self.lane_generation,
            draining=self.draining,
            preemptions=self._preemptions,
            leaked_blocks=self.leaked_blocks,
            queue_wait_s=round(self._steps.meter.wait_s(now), 4),
            cost_batches=self._steps.meter.cost_batches,
            decode_step_s=round(self._steps.decode_step_s, 5),
            counters=asdict(self.receiver.snapshot()),
        )
        load = with_load(fleet, self.attempts.values(), pool.usage(), self._policy, len(self._closing), self._admission)
        self.outbox.stats(load)
