"""Which pods a stream is on: its router, and the workers it was placed on last, in the routers' own words.

Owns: asking every router (`Fleet/Snapshot` for the names of workers, `Explain` for each stream). Must not: judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc

GRPC_PORT = 50051
DEADLINE_S = 5.0
_PLACED = re.compile(r"prefill (\S+), decode (\S+):")


@dataclass(frozen=True)
class Placement:
    """Names of pods. `prefill` computed the prompt of the stream's present attempt; the decode pod itself may have."""

    router: str
    prefill: str
    decode: str

    @property
    def pods(self) -> frozenset[str]:
        return frozenset((self.router, self.prefill, self.decode))


def placements(routers: Mapping[str, str], requests: Iterable[str]) -> dict[str, Placement]:
    """By request id; `routers` maps names of pods to addresses. What no router knows, or has not placed, is left out.

    A router that does not answer is left out with all its streams.
    """
    wanted, found = list(requests), {}
    for name, address in routers.items():
        with grpc.insecure_channel(f"{address}:{GRPC_PORT}") as channel:
            try:
                found |= _of_router(name, channel, wanted)
            except grpc.RpcError:
                continue
    return found


def _of_router(name: str, channel: grpc.Channel, requests: list[str]) -> dict[str, Placement]:
    fleet = pb_grpc.FleetStub(channel).Snapshot(pb.FleetRequest(), timeout=DEADLINE_S)
    workers = {item.description.incarnation: item.description.name for item in fleet.workers}
    stub, found = pb_grpc.InferenceStub(channel), {}
    # All at once: one after the other they would take longer, on a machine that is full, than a stream is young.
    asked = {each: stub.Explain.future(pb.ExplainRequest(request_id=each), timeout=DEADLINE_S) for each in requests}
    for request, answer in asked.items():
        try:
            steps = answer.result().steps
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                continue
            raise
        if placed := _last(steps):
            prefill, decode = placed
            found[request] = Placement(name, workers.get(prefill, decode), decode)
    return found


def _last(steps: Iterable[Any]) -> tuple[str, str] | None:
    """(incarnation or `local`, name) of the attempt that runs."""
    matches = [match for step in steps if step.what == "placed" and (match := _PLACED.match(step.detail))]
    return (matches[-1][1], matches[-1][2]) if matches else None
