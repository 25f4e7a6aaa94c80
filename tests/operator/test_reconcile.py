"""A look and the routers it asks: silence of some must not be waited for by others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from lanewise.config import OperatorConfig
from lanewise.operator.fleet import FleetView
from lanewise.operator.observed import Key, Store
from lanewise.operator.reconcile import Memory, Reconciler
from lanewise.spec_status import RuntimeStatus

KEY = ("chat", "fable")
RUNTIME = RuntimeStatus(version="0.1.0", rendering=1, control_image="c", worker_image="w")


class Fleet:
    """Answers after a while, if at all."""

    def __init__(self, after_s: float, answered: int) -> None:
        self.after_s, self.answered, self.asked = after_s, answered, 0

    async def ask(self, addresses: Sequence[str]) -> FleetView:
        self.asked += 1
        await asyncio.sleep(self.after_s)
        return FleetView(asked=len(addresses), answered=self.answered, taken_at=time.monotonic())


def router() -> dict[str, Any]:
    status = {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}
    return {"metadata": {"labels": {"app.kubernetes.io/component": "router"}}, "status": status}


def reconciler(fleet: Fleet, woken: list[Key]) -> Reconciler:
    nothing: Any = None
    return Reconciler(OperatorConfig(), RUNTIME, nothing, Store(), fleet, woken.append)  # type: ignore[arg-type]


async def test_routers_that_answer_at_once_are_waited_for() -> None:
    woken: list[Key] = []
    fleet, memory = Fleet(0.0, answered=1), Memory()
    looking = reconciler(fleet, woken)
    await looking._ask_fleet(KEY, memory, [router()])
    assert (memory.fleet.answered, memory.asking, woken) == (1, None, [])
    await looking._ask_fleet(KEY, memory, [router()])
    assert fleet.asked == 1, "it is not due yet"


async def test_silent_routers_answer_beside_the_look_and_wake_it() -> None:
    woken: list[Key] = []
    fleet, memory = Fleet(1.0, answered=0), Memory()
    looking = reconciler(fleet, woken)
    started = time.monotonic()
    await asyncio.gather(*(looking._ask_fleet(KEY, Memory(), [router()]) for _ in range(50)))
    await looking._ask_fleet(KEY, memory, [router()])
    assert time.monotonic() - started < 0.9
    assert memory.asking is not None
    await looking._ask_fleet(KEY, memory, [router()])
    assert fleet.asked == 51, "one question at a time"
    async with asyncio.timeout(10):
        while memory.asking is not None:
            await asyncio.sleep(0.01)
    assert (memory.unanswered, memory.fleet.asked) == (1, 1)
    assert KEY in woken
