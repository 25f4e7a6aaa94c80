"""Router and workers as bare processes, where a test needs to choose what runs at which address.

Owns: starting one process and waiting for its ready line. `lanewise up` is not involved.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.e2e.service import until


def free_port() -> int:
    """Below the range from which the system gives ports to connections: nobody takes it before it is listened on."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Process:
    """`python -m lanewise.<module>` with flags; a context manager that ends it."""

    def __init__(self, module: str, log: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
        with log.open("ab") as sink:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", f"lanewise.{module}", *flags],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("{")]
        return [record for record in map(json.loads, lines) if record.get("event") == name]

    def wait_ready(self, timeout_s: float = 60.0) -> dict[str, Any]:
        until(
            lambda: self.events("ready") or self.popen.poll() is not None,
            timeout_s,
            lambda: f"not ready:\n{self.log.read_text()[-3000:]}",
        )
        assert self.popen.poll() is None, self.log.read_text()[-3000:]
        return self.events("ready")[-1]

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()
                raise


def snapshot(address: str) -> pb.FleetReply:
    with grpc.insecure_channel(address) as channel:
        return pb_grpc.FleetStub(channel).Snapshot(pb.FleetRequest(), timeout=5)
