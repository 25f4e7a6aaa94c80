"""A session that breaks while both ends live; a router that dies; a decode worker that sleeps past every deadline."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import grpc
import pytest

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.chaos.test_kill import wait_for_pair
from tests.e2e.service import Generated, Service, generate, generate_all, request, running, service_file, until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]
TOKENS = 400  # long enough to be in the middle when the fault comes


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("sessions"), env={"LANEWISE_HEALTHY_AFTER_S": "0"}) as service:
        yield service


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> list[str]:
    return [result.text for result in asyncio.run(generate_all(service.grpc, messages()))]


def messages() -> list[pb.GenerateRequest]:
    return [
        request(f"Tale {number}: once upon a time", max_tokens=TOKENS, ignore_eos=True, seed=number, temperature=0.8)
        for number in range(8)
    ]


def pause(service: Service, name: str, seconds: float) -> threading.Thread:
    """SIGSTOP now, SIGCONT after a while, from a thread of its own."""
    pid = service.kill(name, signal.SIGSTOP)

    def resume() -> None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=resume)
    thread.start()
    return thread


@pytest.mark.parametrize("paused", ["router", "prefill", "decode"])
def test_a_broken_session_with_both_ends_alive_resumes(service: Service, undisturbed: list[str], paused: str) -> None:
    """Five seconds of silence are more than three missed pings: both ends give the session up, nobody restarts."""
    wait_for_pair(service)
    before = service.pid("prefill"), service.pid("decode"), service.pid("router")
    threads: list[threading.Thread] = []

    def on_token(count: int) -> None:
        if count == 20 and not threads:
            threads.append(pause(service, paused, 5.0))

    results = asyncio.run(generate_all(service.grpc, messages(), on_token=on_token))
    threads[0].join()
    assert [result.reason for result in results] == ["length"] * len(results)
    assert [result.text for result in results] == undisturbed
    assert before == (service.pid("prefill"), service.pid("decode"), service.pid("router"))
    service.audit()


def test_a_killed_router_breaks_its_clients_and_workers_free_within_5_s(
    service: Service, undisturbed: list[str]
) -> None:
    wait_for_pair(service)
    workers = service.pid("prefill"), service.pid("decode")
    killed_at: list[float] = []
    killed_wall: list[float] = []

    def on_token(count: int) -> None:
        if count == 20 and not killed_at:
            killed_wall.append(time.time())
            service.kill("router")
            killed_at.append(time.monotonic())

    async def run() -> tuple[list[BaseException | list[Generated]], float]:
        async with grpc.aio.insecure_channel(service.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            calls = [generate(stub, message, on_token=on_token) for message in messages()]
            return await asyncio.gather(*calls, return_exceptions=True), time.monotonic()

    outcomes, ended_at = asyncio.run(run())
    for outcome in outcomes:
        assert isinstance(outcome, grpc.aio.AioRpcError), f"a client of a killed router saw {outcome}"
        assert outcome.code() is grpc.StatusCode.UNAVAILABLE
    assert ended_at - killed_at[0] < 5
    until(lambda: len(closed_after(service, killed_wall[0])) >= 2, 10, lambda: "the workers did not notice")
    for seconds in closed_after(service, killed_wall[0]):
        assert seconds < 5, f"a worker noticed only after {seconds:.1f} s"
    # The restarted router starts empty and serves; the workers never restarted.
    until(lambda: answers(service), 20, service.read_log)
    wait_for_pair(service)
    service.audit()
    results = asyncio.run(generate_all(service.grpc, messages()))
    assert [result.text for result in results] == undisturbed
    assert workers == (service.pid("prefill"), service.pid("decode"))


def closed_after(service: Service, killed_at: float) -> list[float]:
    """Seconds from the kill to each worker's end of its session; that is when it cancels and frees everything of it."""
    records = [json.loads(line) for line in service.read_log().splitlines() if '"session_closed"' in line]
    times = [datetime.fromisoformat(record["timestamp"]).timestamp() - killed_at for record in records]
    return [seconds for seconds in times if seconds > 0]


def answers(service: Service) -> bool:
    try:
        return bool(service.snapshot().router)
    except grpc.RpcError:  # still starting
        return False


@pytest.mark.slow
def test_a_decode_worker_that_sleeps_longer_than_a_lease_harms_nobody(tmp_path: Path) -> None:
    """Its streams move to the other decode worker; 40 s later it wakes up, frees what it held and serves again."""
    file = service_file(tmp_path / "spec", disaggregation="Always", decode={"replicas": 2})
    with running(tmp_path / "state", file) as service:
        undisturbed = [result.text for result in asyncio.run(generate_all(service.grpc, messages()))]
        before = service.pid("decode-0"), service.pid("decode-1")
        threads: list[threading.Thread] = []

        def on_token(count: int) -> None:
            if count == 20 and not threads:
                threads.append(pause(service, "decode-0", 40.0))

        results = asyncio.run(generate_all(service.grpc, messages(), on_token=on_token))
        assert [result.reason for result in results] == ["length"] * len(results)
        assert [result.text for result in results] == undisturbed
        threads[0].join()
        until(lambda: sum(worker.ready for worker in service.snapshot().workers) == 3, 30, service.read_log)
        assert before == (service.pid("decode-0"), service.pid("decode-1"))
        service.audit()
        again = asyncio.run(generate_all(service.grpc, messages()))
        assert [result.text for result in again] == undisturbed
        service.audit()
