"""kill -9 of either worker of the default 1 + 1 fleet, at ten points of a request's life, 16 requests in flight.

Every request ends once, with the text it has undisturbed; the pools show no leaked block afterwards. The process that
reaches the point stops itself there (SIGSTOP), so the kill hits exactly that state, whichever worker it is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.e2e.service import Generated, Service, generate, generate_all, process_state, request, running, until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]
IN_FLIGHT = 16
TOKENS = 48
DEADLINE_S = 60.0
STORY = (
    "A fox saw a crow with a piece of cheese in her beak, sitting high upon the branch of a tree. He walked up to the "
    "foot of the tree and said: good day, mistress crow, how well you are looking today! "
)
# point -> (process that reaches it, at the n-th time)
INTERNAL = {
    "queued": ("prefill", 5),
    "first_chunk_computing": ("prefill", 1),
    "begin_sent": ("prefill", 4),
    "grant_pending": ("decode", 4),
    "mid_chunk": ("prefill", 4),
    "chunk_sent": ("prefill", 6),
    "commit_sent": ("prefill", 6),
}
AT_CLIENT = {"token_1": 1, "token_2": 2, "token_20": 20}


def messages(seeded: bool = False) -> list[pb.GenerateRequest]:
    """16 different prompts of 40 to 500 tokens."""
    sampling = {"temperature": 0.9, "top_p": 0.95} if seeded else {"temperature": 0.0}
    return [
        request(
            f"Fable {number}. " + STORY * (1 + number % 5), max_tokens=TOKENS, ignore_eos=True, seed=number, **sampling
        )
        for number in range(IN_FLIGHT)
    ]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path]]:
    directory = tmp_path_factory.mktemp("kill")
    spec = directory / "faults"
    spec.write_text("")
    env = {"LANEWISE_FAULTS": "1", "LANEWISE_FAULTS_SPEC": f"@{spec}", "LANEWISE_HEALTHY_AFTER_S": "0"}
    with running(directory / "state", env=env) as service:
        yield service, spec


@pytest.fixture(scope="module")
def undisturbed(fleet: tuple[Service, Path]) -> list[str]:
    results = asyncio.run(generate_all(fleet[0].grpc, messages()))
    assert all(result.reason == "length" for result in results)
    return [result.text for result in results]


@contextlib.contextmanager
def killer(service: Service, spec: Path, victim: str, point: str, at: int, reaches: str) -> Iterator[list[float]]:
    """Kills `victim` when `reaches` has stopped itself at the point. Yields the list that gets the time of the kill."""
    killed: list[float] = []
    stopped, target = service.pid(reaches), service.pid(victim)
    spec.write_text(f"stop@{point}#{at}")

    def watch() -> None:
        deadline = time.monotonic() + DEADLINE_S
        while process_state(stopped) != "T":
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        spec.write_text("")  # the restarted worker must not stop too
        os.kill(target, signal.SIGKILL)
        killed.append(time.monotonic())
        if stopped != target:
            os.kill(stopped, signal.SIGCONT)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        thread.join()
        spec.write_text("")


def check(results: list[Generated], undisturbed: list[str]) -> None:
    for number, (result, text) in enumerate(zip(results, undisturbed, strict=True)):
        assert result.reason == "length", f"request {number}: {result.finished}"
        assert len(result.token_ids) == TOKENS, f"request {number} has {len(result.token_ids)} tokens"
        assert result.text == text, f"request {number} continued differently"


@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("point", list(INTERNAL))
def test_killed_inside_the_protocol(
    fleet: tuple[Service, Path], undisturbed: list[str], point: str, victim: str
) -> None:
    service, spec = fleet
    wait_for_pair(service)
    reaches, at = INTERNAL[point]
    with killer(service, spec, victim, point, at, reaches) as killed:
        results = asyncio.run(generate_all(service.grpc, messages(), timeout_s=DEADLINE_S))
    assert killed, f"no process reached {point}"
    check(results, undisturbed)
    service.audit()


@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("point", list(AT_CLIENT))
def test_killed_when_the_client_has_a_token(
    fleet: tuple[Service, Path], undisturbed: list[str], point: str, victim: str
) -> None:
    service, _ = fleet
    wait_for_pair(service)
    killed: list[float] = []

    def on_token(count: int) -> None:
        if count == AT_CLIENT[point] and not killed:
            service.kill(victim)
            killed.append(time.monotonic())

    async def run() -> list[Generated]:
        async with grpc.aio.insecure_channel(service.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        generate(stub, message, timeout_s=DEADLINE_S, on_token=on_token if index == 0 else None)
                    )
                    for index, message in enumerate(messages())
                ]
            return [task.result()[0] for task in tasks]

    results = asyncio.run(run())
    assert killed
    check(results, undisturbed)
    service.audit()


def test_seeded_sampling_is_the_same_alone_in_a_batch_and_after_a_kill(fleet: tuple[Service, Path]) -> None:
    service, _ = fleet
    wait_for_pair(service)
    alone = [asyncio.run(generate_all(service.grpc, [message]))[0].text for message in messages(seeded=True)]
    assert len(set(alone)) == IN_FLIGHT
    together = asyncio.run(generate_all(service.grpc, messages(seeded=True)))
    assert [result.text for result in together] == alone
    killed: list[float] = []

    def on_token(count: int) -> None:
        if count == 10 and not killed:
            service.kill("decode")
            killed.append(time.monotonic())

    after = asyncio.run(generate_all(service.grpc, messages(seeded=True), on_token=on_token, timeout_s=DEADLINE_S))
    assert killed
    assert [result.text for result in after] == alone
    service.audit()


def wait_for_pair(service: Service) -> None:
    """Both workers are ready again, and each is one that the supervisor started."""

    def ready() -> bool:
        workers = [worker for worker in service.snapshot().workers if worker.ready]
        pids = {worker.description.pid for worker in workers}
        return pids == {service.pid("prefill"), service.pid("decode")}

    until(ready, 30, lambda: f"no pair:\n{service.snapshot()}\n{service.read_log()[-3000:]}")
