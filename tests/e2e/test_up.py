"""What a user sees first: `lanewise up`, its two commands to paste, `status`, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.service import Service, process_state, running, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def run(service: Service, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LANEWISE_STATE_DIR": str(service.state_dir)}
    return subprocess.run(
        [sys.executable, "-m", "lanewise", *argv], capture_output=True, text=True, timeout=60, env=env
    )


def events(service: Service) -> list[str]:
    lines = [line for line in service.read_log().splitlines() if line.startswith("{")]
    return [record["event"] for record in map(json.loads, lines) if record.get("process") == "supervisor"]


def test_ready_lines_and_the_two_commands_work_when_pasted(service: Service) -> None:
    said = events(service)
    for name in ("router", "prefill-0", "decode-0"):
        assert any(re.match(rf"ready +{name}\b.*pid \d+", line) for line in said), said
    for name in ("prefill-0", "decode-0"):
        assert any(re.match(rf"ready +{name} +cpu +\d+", line) for line in said), "device and memory"
    curl = next(line.strip() for line in said if line.strip().startswith("curl"))
    pasted = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(pasted.stdout)["choices"][0]["message"]["content"].strip()
    generate = next(line.strip() for line in said if line.strip().startswith("lanewise generate"))
    result = run(service, *shlex.split(generate)[1:], "--max-tokens", "20")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_ready_within_20_seconds(service: Service) -> None:
    line = next(line for line in events(service) if "is ready after" in line)
    seconds = float(re.search(r"after ([\d.]+) s", line)[1])  # type: ignore[index]
    assert seconds <= 20


def test_router_is_small_and_without_torch(service: Service) -> None:
    pid = service.pid("router")
    status = Path(f"/proc/{pid}/status").read_text()
    rss_mib = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    assert rss_mib <= 120
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_status_lists_every_process(service: Service) -> None:
    result = run(service, "status", "--json")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    for name in ("router", "prefill-0", "decode-0"):
        assert name in text
    table = run(service, "status")
    assert "prefill-0" in table.stdout


def test_ctrl_c_drains_a_running_request_and_leaves_no_process(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        pids = [entry["pid"] for entry in service.record["processes"]]
        client = subprocess.Popen(
            [sys.executable, "-m", "lanewise", "generate", "Once", "--server", service.grpc, "--max-tokens", "300"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        until(lambda: sum(w.stats.running_requests for w in service.snapshot().workers), 20, lambda: "never ran")
        service.process.send_signal(signal.SIGINT)
        out, err = client.communicate(timeout=30)
        assert client.returncode == 0, err
        assert out.strip()
        assert service.process.wait(30) == 0
    until(lambda: all(process_state(pid) in "XZ" for pid in pids), 5, lambda: "processes are left")


def test_a_killed_supervisor_takes_its_processes_along(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        pids = [entry["pid"] for entry in service.record["processes"]]
        service.process.kill()
        service.process.wait(10)
        until(lambda: all(process_state(pid) in "XZ" for pid in pids), 10, lambda: "processes are left")


def test_a_bad_model_ends_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    resource = {
        "apiVersion": "lanewise.io/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": "bad"},
        "spec": {"model": {"uri": f"file://{tmp_path / 'model'}"}},
    }
    file = tmp_path / "bad.yaml"
    file.write_text(json.dumps(resource))
    started = time.monotonic()
    with running(tmp_path / "state", file, ready=False) as service:
        assert service.process.wait(60) == 2
        assert "MambaForCausalLM" in service.read_log()
    assert time.monotonic() - started < 60
