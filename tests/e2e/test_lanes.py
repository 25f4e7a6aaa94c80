"""Lanes over instances with real processes: proposed by the router, decided by the worker, followed by requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml

from lanewise.bench.profile import main as profile
from lanewise.cli import CommandFailed
from lanewise.policy.refit import WARM_BATCHES
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.sim.service import load_profile
from tests.e2e.service import Service, generate_all, request, running, service_file, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]
LANES_S = 40.0  # one move every 5 s at most, and two instances to place


def prefill_workers(service: Service) -> list[pb.FleetWorker]:
    return [worker for worker in service.snapshot().workers if worker.description.role == "prefill"]


def lanes(service: Service) -> dict[str, str]:
    return {worker.description.name: worker.stats.lane for worker in prefill_workers(service)}


def test_two_instances_take_a_lane_each_and_short_prompts_go_to_theirs(tmp_path: Path) -> None:
    file = service_file(tmp_path, disaggregation="Always", prefill={"replicas": 2}, decode={"replicas": 1})
    with running(tmp_path / "state", file, env={"LANEWISE_INSTANCE_LANES": "learned"}) as service:
        until(lambda: sorted(lanes(service).values()) == ["long", "short"], LANES_S, lambda: str(lanes(service)))
        generations = {worker.stats.lane_generation for worker in prefill_workers(service)}
        assert generations == {1}, "each instance was moved once"
        prompts = [[(31 * index + position) % 3000 + 50 for position in range(8)] for index in range(6)]
        asyncio.run(generate_all(service.grpc, [request(p, max_tokens=2, temperature=0.0) for p in prompts]))
        short = next(name for name, lane in lanes(service).items() if lane == "short")
        until(
            lambda: _computed(service, short) and not _computed(service, short, other=True),
            10,
            lambda: f"short prompts belong to {short}: {prefill_workers(service)}",
        )
        for position in range(WARM_BATCHES):  # one after the other: a batch each
            prompt = [(41 * position + index) % 3000 + 50 for index in range(8)]
            asyncio.run(generate_all(service.grpc, [request(prompt, max_tokens=2, temperature=0.0)]))
        _profile_of_a_running_worker(service, short, tmp_path)


def _computed(service: Service, name: str, *, other: bool = False) -> bool:
    """Whether that prefill worker (or the other one) has sent KV of any request."""
    found = [worker for worker in prefill_workers(service) if (worker.description.name == name) != other]
    return any(worker.stats.counters["delivered"] for worker in found)


def _profile_of_a_running_worker(service: Service, name: str, directory: Path) -> None:
    """`lanewise profile --worker` reads what the worker has learned; one without traffic has nothing to tell."""
    by_name = {worker.description.name: worker.address for worker in prefill_workers(service)}
    output = directory / "profile.yaml"
    assert profile(["--worker", by_name.pop(name), "--output", str(output)]) == 0
    measured = load_profile(str(output), directory)
    assert measured.kv_bytes_per_token == 5120
    assert 0 < measured.cost.alone(64) < 5
    assert "refitted" in yaml.safe_load(output.read_text())["notes"]["source"]
    with pytest.raises(CommandFailed, match="no 10 batches yet"):
        profile(["--worker", by_name.popitem()[1]])
