"""`lanewise up`, `down` and `status`.

Owns: their options, and the conversation with a service that runs already.
Must not: supervise (supervisor.py) or decide which processes run (plan.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence

from lanewise.cli import CommandFailed, command_parser
from lanewise.errors import ConfigError
from lanewise.local import machine, state
from lanewise.local.logs import Log
from lanewise.local.plan import Options, ServicePlan, plan
from lanewise.local.supervisor import STOP_S, Supervisor, welcome
from lanewise.spec import LLMService, builtin_service

POLL_S = 0.05
SELF = (sys.executable, "-m", "lanewise")
"""How a detached service starts this program again."""


def up(argv: Sequence[str]) -> int:
    parser = command_parser(
        "up",
        "Serve a model on this machine: a router, prefill and decode workers under one supervisor.\n"
        "Without FILE: the built-in model, one worker of each role. Ctrl-C drains and stops everything.",
        "lanewise up deploy/samples/fable.yaml --http 127.0.0.1:8080",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="an LLMService, as for kubectl")
    parser.add_argument("--http", default="127.0.0.1:8000", metavar="ADDR", help="OpenAI HTTP (default: %(default)s)")
    parser.add_argument("--grpc", default="127.0.0.1:50051", metavar="ADDR", help="gRPC (default: %(default)s)")
    parser.add_argument("--detach", action="store_true", help="return once it is ready; `lanewise down` stops it")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    options = parser.parse_args(argv)
    service = _read(options.file)
    ports = machine.free_ports()
    options.http, options.grpc = (_with_port(address, ports) for address in (options.http, options.grpc))
    _check_free(service.metadata.name, options)
    _check_auth(service, options.http, options.grpc)
    secret_dir = os.environ.get("LANEWISE_SECRET_DIR", "")
    wanted = Options(http=options.http, grpc=options.grpc, log_level=options.log_level, secret_dir=secret_dir)
    decided = plan(service, machine.look(), ports, wanted)
    try:
        state.state_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"cannot keep state in {state.state_dir()} (LANEWISE_STATE_DIR): {error.strerror}") from error
    if options.detach:
        return _detach(options, decided)
    log_file = os.environ.get("LANEWISE_DETACHED_LOG", "")
    return asyncio.run(Supervisor(decided, Log(sys.stdout, options.log_format), log_file).run())


def _read(file: str | None) -> LLMService:
    if file is None:
        return builtin_service()
    from lanewise.spec_yaml import read_service

    return read_service(file)


def _with_port(address: str, ports: Iterator[int]) -> str:
    """Port 0 means any; it is chosen here, since a restarted router must come back at the same one."""
    host, port = machine.split_address(address)
    return machine.join_address(host, port or next(ports))


def _check_free(service: str, options: Namespace) -> None:
    running = {record.service: record for record in state.live_services()}
    if service in running:
        record = running[service]
        raise CommandFailed(
            f"service {service!r} already runs at http://{record.http} (pid {record.pid}); `lanewise down` stops it"
        )
    if machine.split_address(options.http) == machine.split_address(options.grpc):
        raise ConfigError(f"--http and --grpc are the same address, {options.http}")
    for flag in ("http", "grpc"):
        address = getattr(options, flag)
        problem = machine.port_problem(address)
        if problem:
            owner = next((r.service for r in running.values() if address in (r.http, r.grpc)), None)
            by = f" by service {owner!r}" if owner else ""
            raise CommandFailed(f"--{flag} {address}: {problem}{by}; choose another with --{flag} HOST:PORT")


def _check_auth(service: LLMService, *addresses: str) -> None:
    """A file that asks for API keys must not be served without them to other machines."""
    if service.spec.router.auth is None or os.environ.get("LANEWISE_API_KEYS_FILE"):
        return
    hosts = [machine.split_address(address)[0] for address in addresses]
    if any(host != "localhost" and not host.startswith("127.") and host != "::1" for host in hosts):
        raise ConfigError(
            "spec.router.auth names a Kubernetes Secret; to listen beyond this machine, set LANEWISE_API_KEYS_FILE "
            "to a file with one API key per line"
        )
    print(
        "lanewise: spec.router.auth names a Kubernetes Secret; serving this machine without API keys", file=sys.stderr
    )


def _detach(options: Namespace, decided: ServicePlan) -> int:
    """Starts the same command in the background and waits until it is ready or has failed."""
    log = state.state_dir() / f"{decided.service}.log"
    command = [*SELF, "up", *([options.file] if options.file else [])]
    command += ["--http", options.http, "--grpc", options.grpc]
    command += ["--log-format", options.log_format, "--log-level", options.log_level]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal may close
            env={**os.environ, "LANEWISE_DETACHED_LOG": str(log), "PYTHONUNBUFFERED": "1"},
        )
    try:
        while True:
            record = state.read(decided.service)
            if record is not None and record.pid == process.pid and record.ready:
                print("\n".join(welcome(decided, time.time() - record.started_at)))
                print(f"  log     {log}\n  stop    lanewise down {decided.service}")
                return 0
            if process.poll() is not None:
                sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:]))
                print(f"lanewise: the service ended before it was ready; log: {log}", file=sys.stderr)
                return 2 if process.returncode == 2 else 1
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def down(argv: Sequence[str]) -> int:
    parser = command_parser("down", "Drain and stop a local service, with all its processes.", "lanewise down")
    parser.add_argument("service", metavar="NAME", nargs="?", help="which, where several run")
    parser.add_argument("--all", action="store_true", help="every service of this user")
    parser.add_argument("--json", action="store_true", help="what was stopped, as JSON")
    options = parser.parse_args(argv)
    running = state.live_services()
    if options.service is not None:
        chosen = [record for record in running if record.service == options.service]
        if not chosen:
            raise CommandFailed(f"no service {options.service!r} runs here")
    elif len(running) > 1 and not options.all:
        names = ", ".join(record.service for record in running)
        raise ConfigError(f"several services run: {names}; name one, or use --all")
    else:
        chosen = running
    killed = [_stop(record) for record in chosen]
    if options.json:
        print(json.dumps([{"service": r.service, "killed": k} for r, k in zip(chosen, killed, strict=True)]))
    elif not chosen:
        print("no local service runs")
    else:
        for record, hard in zip(chosen, killed, strict=True):
            print(f"{record.service}: {'killed' if hard else 'stopped'}")
    return 0


def _stop(record: state.ServiceState) -> bool:
    """SIGTERM and wait; what is left after the supervisor's own limit is killed. True: it had to be killed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S + 5
    while record.live and time.monotonic() < deadline:
        time.sleep(POLL_S)
    latest = state.read(record.service) or record
    hard = record.live
    if hard:
        os.kill(record.pid, signal.SIGKILL)  # its children get the same signal from the kernel
    for process in latest.processes:
        if process.pid and state.is_alive(process.pid, process.start_time):
            os.kill(process.pid, signal.SIGKILL)
    if hard:
        state.remove(record.service)
    return hard


def status(argv: Sequence[str]) -> int:
    parser = command_parser(
        "status", "Show the processes of the local services. Exit status 1 where none runs.", "lanewise status --json"
    )
    parser.add_argument("service", metavar="NAME", nargs="?")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    running = [record for record in state.live_services() if options.service in (None, record.service)]
    from lanewise.local.status import describe, render

    described = [describe(record) for record in running]
    if options.json:
        print(json.dumps({"services": described}, indent=1))
    elif not described:
        print("no local service runs; start one with: lanewise up")
    else:
        print(render(described))
    return 0 if described else 1
