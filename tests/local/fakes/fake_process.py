"""Stands in for router and workers: reads the real flags, prints the real ready lines, does nothing else."""

import json
import os
import signal
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer

from pydantic_settings import CliApp

from lanewise.config import RouterConfig, WorkerConfig


def _say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def _wait_for_term() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.wait(0.5):
        pass
    _say("drained", level="info")


def worker(role: str) -> None:
    config = CliApp.run(WorkerConfig)
    if config.model == "file:///broken":
        print("model directory /broken has no config.json", file=sys.stderr)
        sys.exit(2)
    _say(
        "ready",
        role=role,
        address=config.listen,
        kv_address=config.kv_listen if role == "decode" else "",
        device="cpu",
        memory_bytes=113_000_000,
        incarnation=str(uuid.uuid4()),
        pid=os.getpid(),
    )
    _wait_for_term()


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def router() -> None:
    config = CliApp.run(RouterConfig)
    assert config.workers
    host, _, port = config.http.rpartition(":")
    server = HTTPServer((host, int(port)), _Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _say("ready", role="router", http=config.http, grpc=config.grpc)
    _say("routable")
    _wait_for_term()
