"""What the router adds to one request: HTTP through it, beside a bare `Worker.Session`, interleaved in one run.

    python benchmarks/router_overhead.py [--requests 500] [--json FILE]

Both sides send 32 random token ids to the same decode worker (local prefill, one output token), one at a time. The
difference of the medians is the added latency. Prints a table; never a test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from lanewise.request import Mode, Sampling, Submission
from lanewise.rpc import convert
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.e2e.processes import Process, free_port, snapshot
from tests.e2e.service import until

PROMPT_TOKENS = 32
WARM_UP = 50


class Direct:
    """A minimal router: one session, one request at a time."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call
        self._number = 0
        self._pinged_at = 0.0

    @classmethod
    async def open(cls, channel: grpc.aio.Channel) -> Direct:
        call = pb_grpc.WorkerStub(channel).Session()  # type: ignore[no-untyped-call]
        await call.write(pb.RouterMessage(hello=pb.RouterHello(router="bench", protocol=1)))
        return cls(call)

    async def ask(self, ids: list[int]) -> float:
        self._number += 1
        if time.perf_counter() - self._pinged_at > 1.0:  # keeps the session; not part of the request
            self._pinged_at = time.perf_counter()
            await self._call.write(pb.RouterMessage(ping=pb.Ping(number=self._number)))
            await asyncio.sleep(0.005)
        submission = Submission(
            f"bench-{self._number}", 1, Mode.LOCAL, tuple(ids), (), Sampling(1, temperature=0.0), None, 60.0, None
        )
        message = pb.RouterMessage(submit=convert.submit_to_wire(submission))
        started = time.perf_counter()
        await self._call.write(message)
        while True:
            reply = await self._call.read()
            if reply.WhichOneof("message") == "step":
                return time.perf_counter() - started


class Http:
    """A keep-alive socket and nothing else: the client's own cost is not the router's."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def ask(self, ids: list[int]) -> float:
        body = json.dumps({"model": "fable", "prompt": ids, "max_tokens": 1, "temperature": 0}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        message = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        started = time.perf_counter()
        self._socket.sendall(message)  # blocking: nothing else happens in this process meanwhile
        reply = self._socket.recv(65536)
        while len(reply) < _length(reply):
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionError(f"the router closed the connection after {reply!r}")
            reply += more
        took = time.perf_counter() - started
        assert b" 200 " in reply.split(b"\r\n")[0], reply
        return took


def _length(reply: bytes) -> int:
    """Bytes of the whole answer, once its head is there."""
    head, end, _ = reply.partition(b"\r\n\r\n")
    found = re.search(rb"(?i)content-length: (\d+)", head)
    return len(head) + len(end) + int(found[1]) if end and found else len(reply) + 1


async def measure(worker: str, http: str, requests: int) -> dict[str, list[float]]:
    dice = random.Random(1)
    times: dict[str, list[float]] = {"direct": [], "router": []}
    async with grpc.aio.insecure_channel(worker) as channel:
        sides = {"direct": await Direct.open(channel), "router": Http(http)}
        for number in range(WARM_UP + requests):
            for side, client in sides.items():
                took = await client.ask([dice.randrange(3, 4000) for _ in range(PROMPT_TOKENS)])
                if number >= WARM_UP:
                    times[side].append(took * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    worker_at, http, public = (f"127.0.0.1:{free_port()}" for _ in range(3))
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker = stack.enter_context(Process("decode_worker", logs / "d", "--listen", worker_at, "--cores", "1"))
        flags = ("--http", http, "--grpc", public, "--workers", worker_at, "--disaggregation", "Never")
        stack.enter_context(Process("router", logs / "r", *flags))
        worker.wait_ready()
        until(lambda: _ready(public), 60, lambda: "the router found no worker")
        times = uvloop.run(measure(worker_at, http, options.requests))
    rows = {side: [statistics.quantiles(values, n=100)[i] for i in (49, 89, 98)] for side, values in times.items()}
    print(f"{'':8} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8}   ({options.requests} requests a side, interleaved)")
    for side, row in rows.items():
        print(f"{side:8} " + " ".join(f"{value:8.2f}" for value in row))
    print("added    " + " ".join(f"{b - a:8.2f}" for a, b in zip(rows["direct"], rows["router"], strict=True)))
    if options.json:
        options.json.write_text(json.dumps({"ms": rows, "added_p50_ms": rows["router"][0] - rows["direct"][0]}))


def _ready(address: str) -> bool:
    try:
        return any(worker.ready for worker in snapshot(address).workers)
    except grpc.RpcError:  # still starting
        return False


if __name__ == "__main__":
    main()
