"""One request at the router, from acceptance to its single end, over all its attempts: a pure state machine.

Owns: epochs, the order of tokens, which workers are engaged, the retry budget, and every time limit of a request.
Must not: do I/O, read a clock (`now` is an argument), or choose workers (the dispatcher passes the pair in).
Each method takes one event and returns what is to be done, in order; events of a past epoch return nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lanewise.errors import ErrorCode, LanewiseError
from lanewise.fleet import Pair, WorkerIdentity
from lanewise.request import Failure, FinishReason, Mode, Partner, Submission, Token
from lanewise.router.orders import Action, Attempt, Cancel, Emit, End, Limits, Order, Phase, Release, Submit

FIRST_BACKOFF_S = 0.01
LAST_BACKOFF_S = 0.5


@dataclass(slots=True)
class Flight:
    order: Order
    limits: Limits
    waiting_since: float
    phase: Phase = Phase.WAITING
    epoch: int = 0
    attempt: Attempt | None = None
    output_ids: list[int] = field(default_factory=list)
    not_before: float = 0.0
    lost: int = 0  # workers lost so far, against the retry budget
    free_retries: int = 0  # in a row, since the last token
    exclude: frozenset[str] = frozenset()  # incarnations the next placement should avoid
    fingerprint: str = ""  # of the attempts that produced `output_ids`; a stream never moves to another
    cached_tokens: int | None = None  # prompt tokens that were not computed; None: not known
    steps: list[tuple[float, int, str, str]] = field(default_factory=list)  # (when, epoch, what, detail), for Explain
    last_step: tuple[str, str] = ("", "")

    # ------------------------------------------------------------ events

    def place(self, pair: Pair, decode: WorkerIdentity, now: float) -> list[Action]:
        """A pair was chosen: start the next attempt on it."""
        self.epoch += 1
        self.phase = Phase.RUNNING
        self.exclude = frozenset()
        engaged = {pair.decode} if pair.prefill is None else {pair.prefill, pair.decode}
        self.attempt = Attempt(self.epoch, pair.prefill, pair.decode, decode.fingerprint, len(self.output_ids), engaged)
        self._note(now, "placed", f"prefill {pair.prefill or 'local'}, decode {decode.name}: {pair.reason}")
        if pair.prefill is None:
            return [Submit(pair.decode, self._submission(Mode.LOCAL, None, now))]
        to_decode = Partner(decode.kv_address, pair.decode)
        to_prefill = Partner("", pair.prefill)
        return [
            Submit(pair.prefill, self._submission(Mode.PREFILL, to_decode, now)),
            Submit(pair.decode, self._submission(Mode.DECODE, to_prefill, now)),
        ]

    def token(self, token: Token, source: str, now: float) -> list[Action]:
        attempt = self.attempt
        if attempt is None or token.epoch != attempt.epoch or source not in attempt.engaged:
            return []
        if source == attempt.decode:
            attempt.decode_spoke = True
        expected = len(self.output_ids)
        if token.index != expected:
            if expected < token.index < self.order.sampling.max_tokens:
                attempt.early[token.index] = token
            return []
        if expected == 0:
            self._note(now, "first_token", "")
        self.free_retries = 0
        self.fingerprint = attempt.fingerprint
        actions: list[Action] = []
        following: Token | None = token
        while following is not None:
            self.output_ids.append(following.token_id)
            actions.append(Emit(following))
            if following.finish is not None or len(self.output_ids) >= self.order.sampling.max_tokens:
                return actions + self._finished(following, source, now)
            following = attempt.early.pop(len(self.output_ids), None)
        return actions + self._release_prefill(attempt)

    def accepted(self, epoch: int, source: str, cached_tokens: int) -> None:
        """Cache hits count once for the client: those of the worker that first computed its prompt."""
        attempt = self.attempt
        if attempt is None or epoch != attempt.epoch or source != (attempt.prefill or attempt.decode):
            return
        if self.cached_tokens is None:
            self.cached_tokens = cached_tokens

    def committed(self, epoch: int, now: float) -> list[Action]:
        """The decode side has all KV: from here on the prefill worker does not matter, once token 1 has come."""
        attempt = self.attempt
        if attempt is None or epoch != attempt.epoch or attempt.committed_at is not None:
            return []
        attempt.committed_at = now
        self._note(now, "committed", "")
        return self._release_prefill(attempt)

    def transfer_failed(self, epoch: int, source: str, reason: str, now: float) -> list[Action]:
        """Re-pairing is free. The prefill worker is avoided once: another, or the decode worker itself, computes."""
        attempt = self.attempt
        if attempt is None or epoch != attempt.epoch or attempt.committed_at is not None:
            return []
        avoid = attempt.prefill if attempt.prefill is not None else source
        return self._retry(now, f"transfer failed: {reason}", {avoid}, free=True)

    def failed(self, failure: Failure, source: str, now: float) -> list[Action]:
        attempt = self.attempt
        if attempt is None or failure.epoch != attempt.epoch or source not in attempt.engaged:
            return []
        attempt.engaged.discard(source)
        release = Release(source, attempt.epoch)
        if failure.retryable:
            return [release, *self._retry(now, f"{failure.code}: {failure.message}", {source}, free=True)]
        if source == attempt.prefill and attempt.committed_after(len(self.output_ids)):
            return [release]
        return [release, *self._end(End(FinishReason.ERROR, LanewiseError(failure.code, failure.message)), now)]

    def worker_lost(self, incarnation: str, epoch: int, now: float, reason: str = "worker lost") -> list[Action]:
        attempt = self.attempt
        if attempt is None or epoch != attempt.epoch or incarnation not in attempt.engaged:
            return []
        attempt.engaged.discard(incarnation)
        harmless = attempt.committed_after(len(self.output_ids))
        if incarnation == attempt.prefill and harmless:
            self._note(now, "prefill_lost", "after commit: changes nothing")
            return []
        self.lost += 1
        if self.lost > self.limits.retry_budget:
            message = f"{reason}; the request had already survived {self.limits.retry_budget} lost workers"
            return self._end(End(FinishReason.ERROR, LanewiseError(ErrorCode.WORKER_LOST, message)), now)
        return self._retry(now, reason, {incarnation}, free=False)

    def hand_over(self, incarnation: str, reason: str, now: float) -> list[Action]:
        """A worker of this attempt drains and another pair is there: go on with it. Free, and without a back-off."""
        if self.attempt is None or incarnation not in self.attempt.engaged:
            return []
        actions = self._retry(now, f"handed over: {reason}", {incarnation}, free=True)
        self.not_before, self.free_retries = 0.0, 0
        return actions

    def cancel(self, now: float, reason: str = "cancelled by the client") -> list[Action]:
        if self.phase is Phase.ENDED:
            return []
        error = LanewiseError(ErrorCode.CANCELLED, reason)
        return self._end(End(FinishReason.CANCELLED, error), now)

    def stop(self, stop_string: str, now: float) -> list[Action]:
        """The text has reached a stop string; what workers still send is overshoot."""
        if self.phase is Phase.ENDED:
            return []
        return self._end(End(FinishReason.STOP, stop_reason=stop_string), now)

    def fail(self, error: LanewiseError, now: float) -> list[Action]:
        """The router itself ends it (shed, hold queue full)."""
        return [] if self.phase is Phase.ENDED else self._end(End(FinishReason.ERROR, error), now)

    def timer(self, now: float) -> list[Action]:
        """Time has passed: whatever is overdue happens."""
        if self.phase is Phase.ENDED:
            return []
        if now >= self.order.deadline_at:
            message = "the deadline of the request passed before it was complete"
            return self._end(End(FinishReason.ERROR, LanewiseError(ErrorCode.DEADLINE, message)), now)
        if self.phase is Phase.WAITING and now >= self.waiting_since + self.limits.hold_timeout_s:
            message = f"no worker pair became available within {self.limits.hold_timeout_s:g} s"
            error = LanewiseError(ErrorCode.NO_WORKERS, message, retry_after_s=1.0)
            return self._end(End(FinishReason.ERROR, error), now)
        if self.phase is Phase.WAITING and now >= self.not_before:
            self.not_before = 0.0  # the back-off is over
        attempt = self.attempt
        if attempt is not None and now >= self._token_due(attempt):
            silent = f"no token for {self.limits.commit_to_token_s:g} s after the KV was committed"
            cancel = Cancel(attempt.decode, attempt.epoch, silent)
            return [cancel, *self.worker_lost(attempt.decode, attempt.epoch, now, f"decode worker failed: {silent}")]
        return []

    def wake_at(self) -> float:
        """When `timer` next has something to do (or, while backing off, when placement may be tried again)."""
        if self.phase is Phase.WAITING:
            hold = self.waiting_since + self.limits.hold_timeout_s
            return min(self.order.deadline_at, hold, self.not_before or hold)
        due = self._token_due(self.attempt) if self.attempt is not None else self.order.deadline_at
        return min(self.order.deadline_at, due)

    # ------------------------------------------------------------ parts

    def _release_prefill(self, attempt: Attempt) -> list[Action]:
        prefill = attempt.prefill
        if prefill is None or prefill not in attempt.engaged or not attempt.committed_after(len(self.output_ids)):
            return []
        attempt.engaged.discard(prefill)
        return [Release(prefill, attempt.epoch)]

    def _token_due(self, attempt: Attempt) -> float:
        if attempt.committed_at is None or attempt.decode_spoke:
            return float("inf")
        return attempt.committed_at + self.limits.commit_to_token_s

    def _finished(self, last: Token, source: str, now: float) -> list[Action]:
        reason = last.finish or FinishReason.LENGTH
        if reason in (FinishReason.ERROR, FinishReason.CANCELLED):
            error = LanewiseError(ErrorCode.INTERNAL, f"the worker ended the request: {reason}")
            return self._end(End(FinishReason.ERROR, error), now)
        by_id = reason is FinishReason.STOP and last.token_id in self.order.sampling.stop_token_ids
        actions: list[Action] = []
        if self.attempt is not None and last.finish is not None:  # the worker that said so has stopped by itself
            self.attempt.engaged.discard(source)
            actions.append(Release(source, self.attempt.epoch))
        return actions + self._end(End(reason, stop_reason=str(last.token_id) if by_id else ""), now)

    def _end(self, end: End, now: float) -> list[Action]:
        actions: list[Action] = list(self._leave(str(end.error) if end.error else str(end.reason)))
        self.phase = Phase.ENDED
        self._note(now, "finished", str(end.error or end.reason))
        return [*actions, replace(end, cached_tokens=self.cached_tokens or 0)]

    def _retry(self, now: float, reason: str, avoid: set[str], *, free: bool) -> list[Action]:
        actions: list[Action] = list(self._leave(f"superseded: {reason}"))
        self.phase = Phase.WAITING
        self.waiting_since = now
        self.exclude = frozenset(avoid)
        self.not_before = 0.0
        if free:
            self.not_before = now + min(FIRST_BACKOFF_S * 2**self.free_retries, LAST_BACKOFF_S)
            self.free_retries = min(self.free_retries + 1, 16)
        self._note(now, "retry" if free else "failover", reason)
        return actions

    def _leave(self, reason: str) -> Iterable[Action]:
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            yield from (Cancel(worker, attempt.epoch, reason) for worker in sorted(attempt.engaged))

    def _submission(self, mode: Mode, partner: Partner | None, now: float) -> Submission:
        order = self.order
        return Submission(
            request_id=order.request_id,
            epoch=self.epoch,
            mode=mode,
            prompt_ids=order.prompt_ids,
            resumed_output_ids=tuple(self.output_ids),
            sampling=order.sampling,
            partner=partner,
            deadline_s=max(0.0, order.deadline_at - now),
            ttft_target_s=order.ttft_target_s,
            tenant_salt=order.tenant_salt,
        )

    def _note(self, now: float, what: str, detail: str) -> None:
        self.last_step = (what, detail)
        if len(self.steps) < 64:  # bounded: a request may back off for as long as its deadline allows
            self.steps.append((now, self.epoch, what, detail))
