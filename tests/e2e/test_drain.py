"""Drain of real processes under load: scale-in, rollout and node drain come down to one SIGTERM, and lose nothing.

One fleet for all tests: a router, a prefill worker and two decode workers; each test puts back what it has drained.
Every stream is checked against its undisturbed text, so a token that is lost, doubled or changed is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.e2e.processes import Process, free_port, snapshot
from tests.e2e.service import Generated, generate, request, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
STREAMS = 16
TOKENS = 400  # a second or two: long enough for a drain to hit every stream half-way
STORY = "A fox saw a crow with a piece of cheese in her beak, sitting high upon the branch of a tree. "


def messages(tokens: int = TOKENS) -> list[pb.GenerateRequest]:
    return [
        request(f"Fable {i}. " + STORY * (1 + i % 3), max_tokens=tokens, ignore_eos=True, temperature=0.0)
        for i in range(STREAMS)
    ]


class Fleet:
    """Workers by name at fixed addresses; a worker that has ended can be started again at its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in ("p0", "d0", "d1")}
        self.workers: dict[str, Process] = {}
        self.http, self.grpc = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self.metrics = f"127.0.0.1:{free_port()}"
        self.router: Process | None = None
        self._starts = 0

    def start(self, name: str, *flags: str) -> None:
        self._starts += 1
        module = "prefill_worker" if name.startswith("p") else "decode_worker"
        common = (
            "--name",
            name,
            "--listen",
            self.addresses[name],
            "--threads",
            "1",
            "--kv-cache-bytes",
            str(128 << 20),
        )
        self.workers[name] = Process(module, self.directory / f"{name}-{self._starts}.log", *common, *flags)

    def start_router(self) -> None:
        self._starts += 1
        flags = ("--http", self.http, "--grpc", self.grpc, "--workers", ",".join(self.addresses.values()))
        flags += ("--hold-timeout-s", "120")  # a worker may start slowly on a busy machine
        log = self.directory / f"router-{self._starts}.log"
        self.router = Process("router", log, "--name", "r0", "--disaggregation", "Always", *flags)

    def wait(self, *ready: str) -> None:
        """Exactly these workers get new work."""

        def there() -> bool:
            with contextlib.suppress(grpc.RpcError):
                workers = snapshot(self.grpc).workers
                return {worker.description.name for worker in workers if worker.ready} == set(ready)
            return False

        until(there, 120, lambda: f"expected {ready} to be ready:\n{snapshot(self.grpc).workers}")

    def carried(self, name: str) -> int:
        return sum(w.inflight for w in snapshot(self.grpc).workers if w.description.name == name)

    def drain(self, name: str) -> subprocess.Popen[bytes]:
        popen = self.workers[name].popen
        popen.send_signal(signal.SIGTERM)
        return popen

    def keep(self, *names: str) -> None:
        """Drain every other worker, so that a test can also run alone."""
        for name, process in self.workers.items():
            if name not in names and process.popen.poll() is None:
                assert self.drain(name).wait(20) == 0

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=5) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.partition("{")[0].split()[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def stop(self) -> None:
        for process in (self.router, *self.workers.values()):
            if process is not None and process.popen.poll() is None:
                process.kill()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("drain"))
    try:
        made.start("p0", *SOON)
        made.start("d0", *SOON, "--metrics", made.metrics)
        made.start("d1", *SOON)
        made.start_router()
        made.wait("p0", "d0", "d1")
        yield made
    finally:
        made.stop()


SOON = ("--drain-timeout-s", "0.3", "--drain-max-s", "60")  # hands over at once
PATIENT = ("--drain-timeout-s", "60", "--drain-max-s", "60")  # finishes in place
BRIEF = ("--drain-timeout-s", "0.1", "--drain-max-s", "0.5")  # gives back what it cannot hand over


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> list[str]:
    return [result.text for result in load(fleet, lambda: None)]


def load(fleet: Fleet, disturb: Callable[[], None], tokens: int = TOKENS) -> list[Generated]:
    """All streams at once; `disturb` runs, in a thread, when every stream has its first token."""
    begun: set[int] = set()

    async def run() -> list[Generated]:
        loop = asyncio.get_running_loop()
        started = asyncio.Event()

        def on_token(stream: int, count: int) -> None:
            begun.add(stream)
            if len(begun) == STREAMS:
                started.set()

        async with grpc.aio.insecure_channel(fleet.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(generate(stub, message, on_token=lambda n, i=i: on_token(i, n), timeout_s=150))
                    for i, message in enumerate(messages(tokens))
                ]
                await started.wait()
                await loop.run_in_executor(None, disturb)
            return [task.result()[0] for task in tasks]

    return asyncio.run(run())


def check(results: list[Generated], undisturbed: list[str]) -> None:
    assert [result.reason for result in results] == ["length"] * STREAMS
    assert [len(result.token_ids) for result in results] == [TOKENS] * STREAMS
    assert [result.text for result in results] == undisturbed


def test_a_decode_worker_scaled_in_under_16_streams_hands_over(fleet: Fleet, undisturbed: list[str]) -> None:
    fleet.wait("p0", "d0", "d1")
    drained: list[subprocess.Popen[bytes]] = []
    etas: list[float] = []

    def disturb() -> None:
        assert fleet.carried("d0") > 0
        drained.append(fleet.drain("d0"))
        until(lambda: reported(fleet, "d0"), 10, lambda: "the drain was not reported")
        etas.extend(w.stats.drain_eta_s for w in reported(fleet, "d0"))
        assert health(fleet.addresses["d0"], "lanewise.v1.Worker") == "NOT_SERVING"
        assert health(fleet.addresses["d0"], "") == "SERVING"

    before = fleet.metric("lanewise_handovers_total"), fleet.metric("lanewise_requests_resumed_total")
    check(load(fleet, disturb), undisturbed)
    assert drained[0].wait(20) == 0
    assert fleet.metric("lanewise_handovers_total") > before[0]
    assert fleet.metric("lanewise_requests_resumed_total") > before[1]
    assert etas[0] > 0
    fleet.start("d0", *SOON)
    fleet.wait("p0", "d0", "d1")


def test_the_only_prefill_worker_drains_while_prompts_arrive(fleet: Fleet, undisturbed: list[str]) -> None:
    fleet.wait("p0", "d0", "d1")
    drained: list[subprocess.Popen[bytes]] = []
    check(load(fleet, lambda: drained.append(fleet.drain("p0"))), undisturbed)
    assert drained[0].wait(20) == 0
    check(load(fleet, lambda: fleet.start("p0", *SOON)), undisturbed)  # the decode workers prefill meanwhile
    fleet.wait("p0", "d0", "d1")


def test_the_only_decode_worker_finishes_in_place(fleet: Fleet, undisturbed: list[str]) -> None:
    fleet.keep("p0")
    fleet.start("d1", *PATIENT)
    fleet.wait("p0", "d1")
    drained: list[subprocess.Popen[bytes]] = []
    handovers = fleet.metric("lanewise_handovers_total")
    check(load(fleet, lambda: drained.append(fleet.drain("d1"))), undisturbed)
    assert drained[0].wait(20) == 0
    assert fleet.metric("lanewise_handovers_total") == handovers


def test_what_outlasts_the_drain_is_held_for_the_next_worker(fleet: Fleet, undisturbed: list[str]) -> None:
    fleet.keep("p0")
    fleet.start("d1", *BRIEF)
    fleet.wait("p0", "d1")
    held = fleet.metric("lanewise_requests_held_total")

    def disturb() -> None:
        assert fleet.drain("d1").wait(20) == 0
        fleet.start("d1", *SOON)

    check(load(fleet, disturb), undisturbed)
    assert fleet.metric("lanewise_requests_held_total") > held
    assert fleet.metric("lanewise_kv_transfers_total") > 0


def test_the_drain_call_does_what_the_signal_does_and_the_process_stays(fleet: Fleet) -> None:
    fleet.keep("p0", "d1")
    fleet.wait("p0", "d1")
    with grpc.insecure_channel(fleet.addresses["d1"]) as channel:
        reply = pb_grpc.WorkerStub(channel).Drain(pb.DrainRequest(timeout_s=1.0), timeout=5)
    assert reply.remaining == 0
    fleet.wait("p0")
    assert fleet.workers["d1"].popen.poll() is None
    assert fleet.drain("d1").wait(20) == 0
    fleet.start("d1", *SOON, "--metrics", fleet.metrics)
    fleet.wait("p0", "d1")
    with urllib.request.urlopen(f"http://{fleet.metrics}/metrics", timeout=5) as page:
        text = page.read().decode()
    for name in ("lanewise_engine_kv_capacity_tokens", "lanewise_engine_routers 1.0", "process_resident_memory_bytes"):
        assert name in text, text


def test_a_router_that_is_told_to_stop_finishes_its_streams(fleet: Fleet, undisturbed: list[str]) -> None:
    fleet.keep("p0", "d1")
    fleet.wait("p0", "d1")
    stopped: list[float] = []

    def disturb() -> None:
        assert fleet.router is not None
        fleet.router.popen.send_signal(signal.SIGTERM)
        until(lambda: ready_status(fleet.http) == 503, 5, lambda: "still ready")
        body = b'{"model": "fable", "prompt": "x"}'
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{fleet.http}/v1/completions", data=body, timeout=5)
        with refused.value as answer:
            assert (answer.code, answer.headers["connection"]) == (503, "close")
        stopped.append(time.monotonic())

    check(load(fleet, disturb), undisturbed)
    assert stopped
    assert fleet.router is not None
    assert fleet.router.popen.wait(20) == 0


def reported(fleet: Fleet, name: str) -> list[pb.FleetWorker]:
    return [w for w in snapshot(fleet.grpc).workers if w.description.name == name and w.reason == "draining"]


def health(address: str, service: str) -> str:
    with grpc.insecure_channel(address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def ready_status(http: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{http}/readyz", timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a PID namespace of its own")
@pytest.mark.parametrize("module", ["decode_worker", "router"])
def test_process_1_of_a_container_hears_sigterm_while_it_starts(module: str, tmp_path: Path) -> None:
    """There a signal without a handler is lost, and the pod would wait out its grace period."""
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", f"lanewise.{module}"]
    outer = subprocess.Popen([*command, "--listen" if module != "router" else "--http", "127.0.0.1:0"])
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        until(lambda: children.read_text().split(), 10, lambda: "unshare has no child")
        inner = int(children.read_text().split()[0])
        until(lambda: catches(inner, signal.SIGTERM), 30, lambda: "no handler for SIGTERM")
        os.kill(inner, signal.SIGTERM)
        assert outer.wait(10) == 128 + signal.SIGTERM
    finally:
        outer.kill()
        outer.wait(10)


def catches(pid: int, number: int) -> bool:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
