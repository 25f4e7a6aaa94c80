"""Half an hour of load with a random worker killed or paused every few seconds; only in `make soak`.

`LANEWISE_SOAK_S` sets the length. Every request ends once, with the text it has undisturbed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.test_kill import messages
from tests.e2e.service import Service, generate_all, running, service_file

SOAK_S = float(os.environ.get("LANEWISE_SOAK_S", "1800"))
pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(SOAK_S + 300)]


def test_random_kills_and_pauses_under_load(tmp_path: Path) -> None:
    file = service_file(tmp_path / "spec", disaggregation="Always", prefill={"replicas": 2}, decode={"replicas": 2})
    dice = random.Random(1)
    with running(tmp_path / "state", file, env={"LANEWISE_HEALTHY_AFTER_S": "0"}) as service:
        expected = [result.text for result in asyncio.run(generate_all(service.grpc, messages()))]
        rounds, faults = asyncio.run(campaign(service, dice, expected))
        service.audit(timeout_s=60)
    print(f"{rounds * len(expected)} requests, {faults} faults, none wrong")
    assert faults > 0


async def campaign(service: Service, dice: random.Random, expected: list[str]) -> tuple[int, int]:
    """Rounds of 16 requests until the time is up, beside a task that does harm."""
    ends_at = time.monotonic() + SOAK_S
    harm = asyncio.create_task(do_harm(service, dice, ends_at))
    rounds = 0
    while time.monotonic() < ends_at:
        results = await generate_all(service.grpc, messages(), timeout_s=120)
        rounds += 1
        for result, text in zip(results, expected, strict=True):
            assert result.reason == "length", result.finished
            assert result.text == text
    return rounds, await harm


async def do_harm(service: Service, dice: random.Random, ends_at: float) -> int:
    faults = 0
    while time.monotonic() < ends_at - 10:
        await asyncio.sleep(dice.uniform(3, 8))
        name = dice.choice(["prefill-0", "prefill-1", "decode-0", "decode-1"])
        if service.process_of(name)["state"] != "ready":
            continue
        faults += 1
        if dice.random() < 0.6:
            service.kill(name)
        else:
            pid = service.kill(name, signal.SIGSTOP)
            await asyncio.sleep(dice.uniform(1, 6))
            os.kill(pid, signal.SIGCONT)
    return faults
