"""The loop of a worker on a thread of its own, with a role that computes nothing."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from typing import Any

from lanewise.request import Mode, Sampling, Submission
from lanewise.rpc.loop import Attempt, WorkerLoop

STEP_S = 0.2


class Idle:
    """An outbox that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Slow(WorkerLoop[Attempt]):
    """Takes `STEP_S` for its first step; says when each submission came and when it was taken in."""

    def __init__(self) -> None:
        super().__init__(Idle())  # type: ignore[arg-type]
        self.stepping = threading.Event()
        self.taken: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()

    def open(self, session: str, submission: Submission, now: float) -> Attempt:
        self.taken.put((now, self.clock()))
        return Attempt(session=session, submission=submission, arrived_at=now, deadline_at=now + submission.deadline_s)

    def turn(self, now: float) -> float | None:
        if not self.stepping.is_set():
            self.stepping.set()
            time.sleep(STEP_S)
        return None

    def close(self, attempt: Attempt, reason: str) -> None:
        """Nothing is held."""

    def on_peers(self, peers: Iterable[tuple[str, str, str]]) -> None:
        """None are used."""

    def audit(self) -> list[str]:
        return []

    def publish(self, now: float) -> None:
        """Nothing to say."""

    @property
    def idle(self) -> bool:
        return not self.attempts


def test_a_submission_arrived_when_it_came_and_not_when_the_step_that_ran_was_over() -> None:
    """Targets count from there, and policies learn from it who was kept waiting by a batch."""
    loop = Slow()
    loop.start()
    assert loop.stepping.wait(5)
    sent = loop.clock()
    loop.submit("s", Submission("r", 1, Mode.LOCAL, (1,), (), Sampling(max_tokens=1), None, 60.0, None))
    arrived, taken = loop.taken.get(timeout=5)
    assert loop.stop(5)
    assert arrived - sent < STEP_S / 4
    assert taken - arrived > STEP_S / 2
