"""The supervisor with real, small child processes: restarts, refusals, the order of the end, nothing left behind."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lanewise.local import state
from lanewise.local.child import Child, backoff_s
from lanewise.local.logs import Log
from lanewise.local.machine import free_ports
from lanewise.local.plan import ProcessPlan, ServicePlan
from lanewise.local.supervisor import Supervisor
from tests.local.conftest import pids_with, poll

READY = "import json; print(json.dumps({'event': 'ready', 'device': 'cpu', 'memory_bytes': 5}), flush=True)"
WAIT = "import signal, sys; signal.signal(signal.SIGTERM, lambda *a: sys.exit(0)); signal.pause()"
SERVE = """
import http.server, threading
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
server = http.server.HTTPServer(('127.0.0.1', PORT), Ready)
threading.Thread(target=server.serve_forever, daemon=True).start()
"""


def child(name: str, *code: str, role: str = "decode") -> ProcessPlan:
    script = "\n".join(textwrap.dedent(part) for part in code)
    return ProcessPlan(name, role, (sys.executable, "-c", script), {}, "127.0.0.1:1")


def service(*children: ProcessPlan, timeout_s: float = 30.0) -> ServicePlan:
    port = next(free_ports())
    router = child("router", SERVE.replace("PORT", str(port)), READY, WAIT, role="router")
    return ServicePlan("t", "t", "m", f"127.0.0.1:{port}", "127.0.0.1:2", timeout_s, (*children, router))


async def until(condition: object, what: str, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


class Running:
    """A supervisor as a task, its log in memory."""

    def __init__(self, plan: ServicePlan, stop_s: float = 15.0) -> None:
        self.out = io.StringIO()
        self.supervisor = Supervisor(plan, Log(self.out, "json"), stop_s=stop_s)
        self.task = asyncio.create_task(self.supervisor.run())

    @property
    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]

    async def ready(self) -> None:
        await until(lambda: self.supervisor.record.ready or self.task.done(), "ready")
        assert self.supervisor.record.ready, self.out.getvalue()

    async def end(self) -> int:
        self.supervisor.stop()
        async with asyncio.timeout(20):
            return await self.task


def test_back_off_starts_at_once_and_is_bounded() -> None:
    assert [backoff_s(n) for n in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]


async def test_start_ready_stop(private: str) -> None:
    running = Running(service(child("decode-0", READY, WAIT)))
    await running.ready()
    (record,) = state.live_services()
    assert record.ready
    assert [(p.name, p.state, p.device, p.memory_bytes) for p in record.processes] == [
        ("decode-0", "ready", "cpu", 5),
        ("router", "ready", "cpu", 5),
    ]
    words = " ".join(str(event["event"]) for event in running.events)
    for expected in ("ready  decode-0  cpu  5 B", "ready  router", "curl http://127.0.0.1:", "lanewise generate"):
        assert expected in words
    assert await running.end() == 0
    assert state.live_services() == []
    assert list(state.state_dir().glob("*.json")) == []


async def test_a_killed_child_comes_back_at_once(private: str) -> None:
    running = Running(service(child("decode-0", READY, WAIT)))
    await running.ready()
    decode = running.supervisor.children[0]
    first = decode.pid
    started = time.monotonic()
    os.kill(first, signal.SIGKILL)
    await until(lambda: decode.state == "ready" and decode.pid != first, "restarted")
    assert decode.restarts == 1
    assert "decode-0 ended with signal SIGKILL; restart 1" in running.out.getvalue()
    assert time.monotonic() - started < 5
    assert state.live_services()[0].processes[0].restarts == 1
    assert await running.end() == 0


async def test_a_child_that_keeps_failing_ends_the_start(private: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lanewise.local.child.BACKOFF_S", (0.0, 0.01))
    running = Running(service(child("decode-0", "raise RuntimeError('no such weights')")))
    async with asyncio.timeout(20):
        assert await running.task == 1
    assert "gave up after 5 starts" in running.out.getvalue()
    assert "no such weights" in running.out.getvalue()


async def test_a_refused_configuration_stops_everything(private: str) -> None:
    bad = child("decode-0", "import sys; print('model directory /x is empty', file=sys.stderr); sys.exit(2)")
    running = Running(service(child("prefill-0", READY, WAIT), bad))
    async with asyncio.timeout(20):
        assert await running.task == 2
    assert running.events[-1]["event"] == "lanewise: stopped: decode-0: model directory /x is empty"


async def test_not_ready_in_time_names_who(private: str) -> None:
    running = Running(service(child("decode-0", WAIT), timeout_s=1.0))
    async with asyncio.timeout(20):
        assert await running.task == 1
    assert "not ready after 1 s: decode-0" in running.out.getvalue()


async def test_the_router_ends_before_the_workers(private: str, tmp_path: Path) -> None:
    log = tmp_path / "order"
    told = f"""
        import signal, sys, time
        def end(*a):
            open({str(log)!r}, 'a').write('NAME\\n'); sys.exit(0)
        signal.signal(signal.SIGTERM, end)
    """
    plan = service(child("decode-0", told.replace("NAME", "decode"), READY, "signal.pause()"))
    router = plan.processes[-1]
    code = router.argv[-1].replace(WAIT, textwrap.dedent(told.replace("NAME", "router")) + "\nsignal.pause()")
    router = ProcessPlan("router", "router", (*router.argv[:-1], code), {}, router.address)
    running = Running(ServicePlan("t", "t", "m", plan.http, plan.grpc, 30.0, (plan.processes[0], router)))
    await running.ready()
    assert await running.end() == 0
    assert log.read_text().split() == ["router", "decode"]


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


async def test_a_child_that_ignores_sigterm_is_killed_in_time(private: str) -> None:
    running = Running(service(child("decode-0", STUBBORN, READY, "signal.pause()")), stop_s=0.5)
    await running.ready()
    started = time.monotonic()
    assert await running.end() == 0
    assert time.monotonic() - started < 5


async def test_a_second_signal_kills_at_once(private: str) -> None:
    running = Running(service(child("decode-0", STUBBORN, READY, "signal.pause()")), stop_s=60.0)
    await running.ready()
    os.kill(os.getpid(), signal.SIGINT)
    await until(lambda: "draining" in running.out.getvalue(), "draining")
    os.kill(os.getpid(), signal.SIGINT)
    async with asyncio.timeout(10):
        assert await running.task == 0


async def test_descendants_of_a_dead_child_are_ended(private: str) -> None:
    forks = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])"
    running = Running(service(child("decode-0", forks, READY, WAIT)))
    await running.ready()
    decode = running.supervisor.children[0]
    first = decode.pid
    assert len(pids_with(private)) == 3
    os.kill(first, signal.SIGKILL)
    await until(lambda: decode.state == "ready" and decode.pid != first, "restarted")
    await until(lambda: len(pids_with(private)) == 3, "the old grandchild gone")
    assert await running.end() == 0


async def test_a_child_that_is_ready_before_its_start_is_seen(private: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine can run the whole start of a child before the supervisor's turn comes again."""
    spawn = Child._spawn

    async def slow_spawn(self: Child, loop: asyncio.AbstractEventLoop) -> object:
        made = await spawn(self, loop)
        await until(lambda: self.ready, "the ready line")
        return made

    monkeypatch.setattr(Child, "_spawn", slow_spawn)
    running = Running(service(child("decode-0", READY, WAIT)))
    await running.ready()
    assert await running.end() == 0


async def test_long_and_odd_lines_pass(private: str) -> None:
    odd = "import os; os.write(1, b'x' * 3_000_000 + b'\\n' + b'\\xff\\xfe\\n' + b'{not json\\n')"
    running = Running(service(child("decode-0", odd, READY, WAIT)))
    await running.ready()
    assert await running.end() == 0
    lines = [str(event["event"]) for event in running.events if event["process"] == "decode-0"]
    assert sum(line.count("x") for line in lines) == 3_000_000
    assert "{not json" in lines


def test_children_die_with_a_killed_supervisor(private: str) -> None:
    script = Path(__file__).parent / "fakes" / "lanewise_with_fakes.py"
    command = [sys.executable, str(script), "up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        poll(lambda: any(record.ready for record in state.live_services()), "ready")
        assert len(pids_with(private)) == 4
        process.kill()
    poll(lambda: not pids_with(private), "children gone", 5.0)
    assert state.live_services() == []  # the record is there, but nobody takes it for a live service
