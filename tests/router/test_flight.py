"""The state machine of one request, driven event by event: no clock, no sockets."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lanewise.errors import ErrorCode
from lanewise.fleet import Pair, Role, WorkerIdentity
from lanewise.request import Failure, FinishReason, Mode, Sampling, Token
from lanewise.router.flight import Flight
from lanewise.router.orders import Action, Cancel, Emit, End, Limits, Order, Phase, Release, Submit

LIMITS = Limits(hold_timeout_s=30.0, retry_budget=2, commit_to_token_s=10.0)
ORDER = Order("r", "m", (1, 2, 3), Sampling(max_tokens=6, stop_token_ids=frozenset({99})), 600.0, 0.4)


def decode(name: str) -> WorkerIdentity:
    return WorkerIdentity(Role.DECODE, name, name, "", f"tcp://{name}", "m", "ff", {}, 100, 100, 100, "cpu", 1)


def pair(prefill: str | None = "p", decode_name: str = "d") -> Pair:
    return Pair(prefill, decode_name, 0.1, "test")


def placed(prefill: str | None = "p", now: float = 0.0) -> Flight:
    flight = Flight(ORDER, LIMITS, waiting_since=now)
    flight.place(pair(prefill), decode("d"), now)
    return flight


def token(index: int, epoch: int = 1, finish: FinishReason | None = None, token_id: int | None = None) -> Token:
    return Token("r", epoch, index, 10 + index if token_id is None else token_id, finish=finish)


def kinds(actions: list[Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


def ends(actions: list[Action]) -> list[End]:
    return [action for action in actions if isinstance(action, End)]


class TestHappyPath:
    def test_both_sides_are_submitted_at_once(self) -> None:
        flight = Flight(ORDER, LIMITS, 0.0)
        actions = flight.place(pair(), decode("d"), 1.0)
        to_prefill, to_decode = actions
        assert isinstance(to_prefill, Submit)
        assert isinstance(to_decode, Submit)
        assert (to_prefill.incarnation, to_prefill.submission.mode) == ("p", Mode.PREFILL)
        assert to_prefill.submission.partner is not None
        assert to_prefill.submission.partner.kv_address == "tcp://d"
        assert (to_decode.incarnation, to_decode.submission.mode) == ("d", Mode.DECODE)
        assert to_decode.submission.partner is not None
        assert to_decode.submission.partner.incarnation == "p"
        assert to_decode.submission.deadline_s == 599.0

    def test_only_decode_workers_prefill_locally(self) -> None:
        actions = Flight(ORDER, LIMITS, 0.0).place(pair(None), decode("d"), 0.0)
        assert [a.submission.mode for a in actions if isinstance(a, Submit)] == [Mode.LOCAL]

    def test_to_the_end(self) -> None:
        flight = placed()
        assert kinds(flight.token(token(0), "p", 0.1)) == ["Emit"]
        assert flight.committed(1, 0.2) == [Release("p", 1)]
        for index in range(1, 5):
            assert kinds(flight.token(token(index), "d", 0.3)) == ["Emit"]
        actions = flight.token(token(5, finish=FinishReason.LENGTH), "d", 0.4)
        assert kinds(actions) == ["Emit", "Release", "End"]
        assert flight.phase is Phase.ENDED

    def test_finished_at_token_1_cancels_the_decode_side(self) -> None:
        actions = placed().token(token(0, finish=FinishReason.STOP), "p", 0.1)
        assert kinds(actions) == ["Emit", "Release", "Cancel", "End"]
        assert isinstance(actions[2], Cancel)
        assert actions[2].incarnation == "d"

    def test_stop_id_is_named(self) -> None:
        actions = placed().token(token(0, finish=FinishReason.STOP, token_id=99), "p", 0.1)
        assert ends(actions)[0].stop_reason == "99"

    def test_a_worker_that_forgets_max_tokens_is_cut_off(self) -> None:
        flight = placed()
        actions = [action for i in range(9) for action in flight.token(token(i), "d", 0.0)]
        assert len(flight.output_ids) == 6
        assert [end.reason for end in ends(actions)] == [FinishReason.LENGTH]
        assert {a.incarnation for a in actions if isinstance(a, Cancel)} == {"p", "d"}


class TestOrder:
    def test_token_2_may_overtake_token_1(self) -> None:
        flight = placed()
        assert flight.token(token(1), "d", 0.1) == []
        assert flight.token(token(2), "d", 0.1) == []
        emitted = [a.token.index for a in flight.token(token(0), "p", 0.1) if isinstance(a, Emit)]
        assert emitted == [0, 1, 2]

    def test_duplicates_and_other_epochs_are_dropped(self) -> None:
        flight = placed()
        flight.token(token(0), "p", 0.1)
        assert flight.token(token(0), "d", 0.1) == []
        assert flight.token(token(1, epoch=0), "d", 0.1) == []
        assert flight.token(token(1, epoch=2), "d", 0.1) == []
        assert flight.output_ids == [10]

    def test_commit_before_token_1_still_needs_the_prefill_worker(self) -> None:
        flight = placed()
        assert flight.committed(1, 0.1) == []
        assert kinds(flight.token(token(0), "p", 0.2)) == ["Emit", "Release"]


class TestFailover:
    def test_resumes_with_what_the_client_has(self) -> None:
        flight = placed()
        flight.token(token(0), "p", 0.1)
        flight.committed(1, 0.1)
        flight.token(token(1), "d", 0.2)
        assert flight.worker_lost("d", 1, 0.3) == []  # the prefill worker had been released
        assert (flight.phase, flight.exclude, flight.not_before) == (Phase.WAITING, {"d"}, 0.0)
        assert flight.token(token(2), "d", 0.3) == []  # a late message of the fenced epoch
        actions = flight.place(pair("p2", "d2"), decode("d2"), 0.4)
        submissions = [a.submission for a in actions if isinstance(a, Submit)]
        assert {s.epoch for s in submissions} == {2}
        assert {s.resumed_output_ids for s in submissions} == {(10, 11)}
        assert kinds(flight.token(token(2, epoch=2), "p2", 0.5)) == ["Emit"]
        assert flight.fingerprint == "ff"

    def test_prefill_lost_after_commit_changes_nothing(self) -> None:
        flight = placed()
        flight.token(token(0), "p", 0.1)
        flight.attempt.committed_at = 0.1  # type: ignore[union-attr]
        assert flight.worker_lost("p", 1, 0.2) == []
        assert (flight.phase, flight.lost) == (Phase.RUNNING, 0)

    def test_prefill_lost_before_token_1_resumes_even_after_commit(self) -> None:
        flight = placed()
        flight.committed(1, 0.1)
        assert kinds(flight.worker_lost("p", 1, 0.2)) == ["Cancel"]
        assert (flight.phase, flight.lost) == (Phase.WAITING, 1)

    def test_prefill_lost_before_commit_fails_over(self) -> None:
        flight = placed()
        flight.token(token(0), "p", 0.1)
        assert kinds(flight.worker_lost("p", 1, 0.2)) == ["Cancel"]
        assert flight.phase is Phase.WAITING

    def test_budget(self) -> None:
        flight = placed()
        for epoch in (1, 2):
            flight.worker_lost("d", epoch, 0.1)
            flight.place(pair(), decode("d"), 0.2)
        end = ends(flight.worker_lost("d", 3, 0.3))[0]
        assert end.error is not None
        assert end.error.code is ErrorCode.WORKER_LOST

    def test_both_lost_at_once_costs_one(self) -> None:
        flight = placed()
        flight.worker_lost("p", 1, 0.1)
        flight.worker_lost("d", 1, 0.1)
        assert flight.lost == 1

    def test_busy_is_free_but_does_not_spin(self) -> None:
        flight = placed()
        waits = []
        for epoch in range(1, 12):
            failure = Failure("r", epoch, ErrorCode.OVERLOADED, "BUSY", retryable=True)
            flight.failed(failure, "d", 0.0)
            assert flight.exclude == {"d"}
            waits.append(flight.wake_at())
            flight.timer(waits[-1])
            flight.place(pair(), decode("d"), 0.0)
        assert flight.lost == 0
        assert waits[:3] == pytest.approx([0.01, 0.02, 0.04])
        assert waits[-1] == 0.5

    def test_transfer_failure_avoids_the_prefill_worker(self) -> None:
        flight = placed()
        assert kinds(flight.transfer_failed(1, "d", "crc", 0.0)) == ["Cancel", "Cancel"]
        assert (flight.exclude, flight.lost) == ({"p"}, 0)

    def test_final_failure_ends_the_request(self) -> None:
        actions = placed().failed(Failure("r", 1, ErrorCode.PROMPT_TOO_LONG, "no", retryable=False), "d", 0.0)
        assert kinds(actions) == ["Release", "Cancel", "End"]
        assert ends(actions)[0].error.code is ErrorCode.PROMPT_TOO_LONG  # type: ignore[union-attr]


class TestTime:
    def code(self, actions: list[Action]) -> ErrorCode:
        error = ends(actions)[0].error
        assert error is not None
        return error.code

    def test_held_too_long(self) -> None:
        flight = Flight(ORDER, LIMITS, 5.0)
        assert flight.wake_at() == 35.0
        assert flight.timer(34.9) == []
        assert self.code(flight.timer(35.0)) is ErrorCode.NO_WORKERS

    def test_deadline_wins_over_holding(self) -> None:
        flight = Flight(replace(ORDER, deadline_at=6.0), LIMITS, 5.0)
        assert flight.wake_at() == 6.0
        assert self.code(flight.timer(6.0)) is ErrorCode.DEADLINE

    def test_deadline_cancels_both_sides(self) -> None:
        actions = placed().timer(600.0)
        assert kinds(actions) == ["Cancel", "Cancel", "End"]
        assert self.code(actions) is ErrorCode.DEADLINE

    def test_committed_without_a_token_is_a_failure_of_the_decode_worker(self) -> None:
        flight = placed()
        flight.token(token(0), "p", 0.1)
        flight.committed(1, 1.0)
        assert flight.wake_at() == 11.0
        actions = flight.timer(11.0)
        assert kinds(actions) == ["Cancel"]
        assert (flight.phase, flight.exclude, flight.lost) == (Phase.WAITING, {"d"}, 1)

    def test_a_decode_token_ends_that_watch(self) -> None:
        flight = placed()
        flight.token(token(0), "p", 0.1)
        flight.committed(1, 1.0)
        flight.token(token(1), "d", 2.0)
        assert flight.wake_at() == 600.0

    def test_client_cancel_and_stop_string(self) -> None:
        assert kinds(placed().cancel(1.0)) == ["Cancel", "Cancel", "End"]
        actions = placed().stop("END", 1.0)
        assert kinds(actions) == ["Cancel", "Cancel", "End"]
        assert ends(actions)[0].stop_reason == "END"


class FlightMachine(RuleBasedStateMachine):
    """Any sequence of events: tokens in order and gapless, one end, and no worker left engaged."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.flight = Flight(ORDER, LIMITS, 0.0)
        self.emitted: list[int] = []
        self.ended = 0
        self.engaged: set[tuple[str, int]] = set()
        self.placements = 0

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            assert not self.ended
            match action:
                case Submit(incarnation, submission):
                    self.engaged.add((incarnation, submission.epoch))
                    assert submission.resumed_output_ids == tuple(self.flight.output_ids)
                case Cancel(incarnation, epoch, _) | Release(incarnation, epoch):
                    self.engaged.remove((incarnation, epoch))
                case Emit(emitted):
                    assert emitted.index == len(self.emitted)
                    self.emitted.append(emitted.index)
                case End():
                    self.ended += 1

    @precondition(lambda self: self.flight.phase is Phase.WAITING)
    @rule(local=st.booleans())
    def place(self, local: bool) -> None:
        self.placements += 1
        name = f"d{self.placements}"
        prefill = None if local else f"p{self.placements}"
        self.take(self.flight.place(pair(prefill, name), decode(name), self.now))

    @rule(index=st.integers(0, 7), back=st.integers(0, 2), decode_side=st.booleans(), last=st.booleans())
    def token(self, index: int, back: int, decode_side: bool, last: bool) -> None:
        finish = FinishReason.STOP if last and index > 3 else None
        source = f"{'d' if decode_side else 'p'}{self.placements}"
        self.take(self.flight.token(token(index, self.flight.epoch - back, finish), source, self.now))

    @rule(back=st.integers(0, 1))
    def committed(self, back: int) -> None:
        self.take(self.flight.committed(self.flight.epoch - back, self.now))

    @rule(decode_side=st.booleans(), retryable=st.booleans())
    def failed(self, decode_side: bool, retryable: bool) -> None:
        failure = Failure("r", self.flight.epoch, ErrorCode.INTERNAL, "x", retryable)
        self.take(self.flight.failed(failure, f"{'d' if decode_side else 'p'}{self.placements}", self.now))

    @rule(decode_side=st.booleans())
    def lost(self, decode_side: bool) -> None:
        name = f"{'d' if decode_side else 'p'}{self.placements}"
        self.engaged.discard((name, self.flight.epoch))
        self.take(self.flight.worker_lost(name, self.flight.epoch, self.now))

    @rule()
    def transfer_failed(self) -> None:
        self.take(self.flight.transfer_failed(self.flight.epoch, f"d{self.placements}", "x", self.now))

    @rule(seconds=st.floats(0.0, 5.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.flight.timer(self.now))

    @rule()
    def cancel(self) -> None:
        self.take(self.flight.cancel(self.now))

    @invariant()
    def an_end_leaves_nobody_at_work(self) -> None:
        assert (self.flight.phase is Phase.ENDED) == bool(self.ended)
        if self.flight.attempt is None:
            assert self.engaged == set()
        else:
            assert {worker for worker, _ in self.engaged} == self.flight.attempt.engaged
        if self.flight.phase is not Phase.ENDED:
            assert self.flight.wake_at() <= ORDER.deadline_at


FlightMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFlightMachine = FlightMachine.TestCase
