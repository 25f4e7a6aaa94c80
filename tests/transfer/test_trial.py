"""Which way data goes to a partner: the fastest of those that answer."""

from __future__ import annotations

import pytest

from lanewise.transfer import messages as m
from lanewise.transfer.trial import TRIES, Route, Trial


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ((3.0, 1.0), Route.REFERENCE),
        ((1.0, 1.9), Route.REFERENCE),
        ((1.0, 2.1), Route.BYTES),
        ((1.0, None), Route.BYTES),
    ],
)
def test_the_fastest_way_is_taken(seconds, best):
    trial = Trial("p", "d", 1000, (Route.BYTES, Route.REFERENCE))
    now = 0.0
    for number in range(2 * TRIES):
        probe, block = trial.next(now)
        route = number % 2
        assert bool(probe.runs) == (block is None) == bool(route)
        taken = seconds[route]
        now += trial.due_at if taken is None else taken + number // 2  # the fastest of the tries counts
        wrong = m.ProbeAck("d", "p", probe.nonce, b"12345678")
        assert not trial.heard(wrong, now)
        if taken is not None:
            assert trial.heard(m.ProbeAck("d", "p", probe.nonce, probe.crc), now)
    assert trial.next(now) is None
    assert trial.best() is best


@pytest.mark.parametrize(
    ("zeromq", "direct", "reference", "best"),
    [
        (1.0, 1.9, None, Route.BYTES),
        (1.0, 2.1, None, Route.ZEROMQ),
        (1.0, None, None, Route.ZEROMQ),
        (None, 9.0, None, Route.BYTES),
        (1.0, 1.0, 1.9, Route.REFERENCE),
        (1.0, 1.9, 2.1, Route.BYTES),  # not in steps away from the fastest
        (1.0, 3.0, 1.5, Route.REFERENCE),
        (None, None, None, None),
    ],
)
def test_of_three_ways_that_which_spares_the_cores_unless_it_is_slow(zeromq, direct, reference, best):
    trial = Trial("p", "d", 1000, (Route.BYTES, Route.ZEROMQ, Route.REFERENCE))
    found = {Route.ZEROMQ: zeromq, Route.BYTES: direct, Route.REFERENCE: reference}
    trial.seconds = {route: seconds for route, seconds in found.items() if seconds is not None}
    assert trial.best() is best


def test_no_answer_is_no_way():
    trial = Trial("p", "d", 3, (Route.BYTES,))
    while trial.next(0.0):
        pass
    assert trial.best() is None
