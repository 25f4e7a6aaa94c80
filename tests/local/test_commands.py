"""`up`, `status` and `down` as a user runs them, with fake workers that parse the real flags."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lanewise.local import state
from tests.local.conftest import FAKES, pids_with, poll

LANEWISE = (sys.executable, str(FAKES / "lanewise_with_fakes.py"))
ANY_PORTS = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
COMBINED = """
apiVersion: lanewise.io/v1alpha1
kind: LLMService
metadata: {name: NAME}
spec:
  model: {uri: URI}
  prefill: {replicas: 0}
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((*LANEWISE, *arguments), capture_output=True, text=True, timeout=60)


def write(tmp_path: Path, name: str, uri: str = "builtin://fable") -> str:
    path = tmp_path / f"{name}.yaml"
    path.write_text(COMBINED.replace("NAME", name).replace("URI", uri))
    return str(path)


def test_detach_status_down(private: str) -> None:
    started = run("up", "--detach", *ANY_PORTS)
    assert started.returncode == 0, started.stderr
    assert "fable is ready after" in started.stdout
    assert "/v1/chat/completions" in started.stdout
    assert len(pids_with(private)) == 4  # the supervisor, a router, two workers

    shown = run("status", "--json")
    assert shown.returncode == 0, shown.stderr
    (service,) = json.loads(shown.stdout)["services"]
    assert service["ready"]
    assert [(row["role"], row["state"]) for row in service["processes"]] == [
        ("prefill", "ready"),
        ("decode", "ready"),
        ("router", "ready"),
    ]
    assert "UNAVAILABLE" in service["router_problem"]  # the fake router speaks no gRPC, and status says so
    table = run("status").stdout
    assert "prefill-0" in table
    assert "113 MB" in table

    again = run("up", *ANY_PORTS)
    assert again.returncode == 1
    assert "service 'fable' already runs" in again.stderr

    down = run("down")
    assert (down.returncode, down.stdout) == (0, "fable: stopped\n")
    assert run("status").returncode == 1
    assert run("down").stdout == "no local service runs\n"


def test_ctrl_c_drains_and_exits_zero(private: str) -> None:
    with subprocess.Popen(
        (*LANEWISE, "up", *ANY_PORTS, "--log-format", "json"), stdout=subprocess.PIPE, text=True
    ) as process:
        poll(lambda: any(record.ready for record in state.live_services()), "ready")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    records = [json.loads(line) for line in out.splitlines()]  # every line of the merged log is JSON
    drained = [record["process"] for record in records if record["event"] == "drained"]
    assert drained[0] == "router"
    assert sorted(drained) == ["decode-0", "prefill-0", "router"]


def test_a_reader_that_leaves_ends_the_service(private: str) -> None:
    with subprocess.Popen((*LANEWISE, "up", *ANY_PORTS), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        poll(lambda: any(record.ready for record in state.live_services()), "ready")
        process.stdout.close()
        router = next(p for p in state.live_services()[0].processes if p.role == "router")
        os.kill(router.pid, signal.SIGKILL)  # something to write about
        assert process.stderr.read() == b""
        process.wait(20)


def test_a_detached_service_that_fails_says_why(private: str, tmp_path: Path) -> None:
    result = run("up", write(tmp_path, "broken", "file:///broken"), "--detach", *ANY_PORTS)
    assert result.returncode == 2
    assert "model directory /broken has no config.json" in result.stderr


def test_several_services_need_a_name_to_go_down(private: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("up", write(tmp_path, name), "--detach", *ANY_PORTS).returncode == 0
    unnamed = run("down")
    assert unnamed.returncode == 2
    assert "several services run: a, b" in unnamed.stderr
    assert run("down", "b").stdout == "b: stopped\n"
    assert json.loads(run("down", "--all", "--json").stdout) == [{"service": "a", "killed": False}]
    assert run("down", "a").returncode == 1


def test_a_taken_port_is_named_before_anything_starts(private: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("up", "--http", f"127.0.0.1:{port}", "--grpc", "127.0.0.1:0")
    assert result.returncode == 1
    assert f"port {port} of 127.0.0.1 is already in use" in result.stderr
    assert "--http" in result.stderr


def test_bad_addresses_and_files_are_bad_usage(private: str, tmp_path: Path) -> None:
    bad: Sequence[tuple[tuple[str, ...], str]] = (
        (("--http", "8000"), "expected an address such as"),
        (("nowhere.yaml",), "cannot read nowhere.yaml"),
        ((write(tmp_path, "claim", "pvc://weights"),), "is a Kubernetes claim"),
        (("--http", "127.0.0.1:7001", "--grpc", "127.0.0.1:7001"), "the same address"),
    )
    for arguments, message in bad:
        result = run("up", *arguments)
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr


def test_a_record_of_a_dead_supervisor_is_not_live(private: str) -> None:
    with subprocess.Popen((sys.executable, "-c", "import signal; signal.pause()")) as process:
        record = state.ServiceState("x", "x", "m", "h:1", "g:1", process.pid, state.start_time(process.pid), 0.0)
        state.write(record)
        assert [found.service for found in state.live_services()] == ["x"]
        record.start_time += 1  # the pid was given to somebody else
        state.write(record)
        assert state.live_services() == []
        process.kill()
    (state.state_dir() / "junk.json").write_text("{")
    assert state.live_services() == []


def test_start_time_of_a_zombie_is_none(private: str) -> None:
    process = subprocess.Popen((sys.executable, "-c", ""))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert state.start_time(process.pid) == 0
    process.wait()
