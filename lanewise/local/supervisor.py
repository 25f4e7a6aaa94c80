"""Runs all processes of one local service until a signal or a hopeless failure, then drains and ends them all.

Owns: the order of start and end, total readiness (`GET /readyz`), the ready lines, the state file.
Must not: decide what runs (plan.py), restart a process (child.py), parse the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

from lanewise.local import state as records
from lanewise.local.child import Child, ChildFailed, Stream
from lanewise.local.logs import Log, size
from lanewise.local.machine import reachable, rss_bytes, split_address
from lanewise.local.plan import ServicePlan

STOP_S = 15.0
"""All processes are gone this long after the first Ctrl-C."""
ROUTER_STOP_S = 10.0
"""Of which the router may use this long to finish its streams; workers are asked to end only then."""
READYZ_INTERVAL_S = 0.1


class Supervisor:
    def __init__(self, plan: ServicePlan, log: Log, log_file: str = "", stop_s: float = STOP_S) -> None:
        self._plan = plan
        self._log = log
        log.on_lost = self._on_lost_log
        self._stop_s = stop_s
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: ChildFailed | None = None
        self._started = time.monotonic()
        self.children = [Child(process, self._on_line, self._on_change) for process in plan.processes]
        self.record = records.ServiceState(
            service=plan.service,
            served_name=plan.served_name,
            model=plan.model,
            http=plan.http,
            grpc=plan.grpc,
            pid=os.getpid(),
            start_time=records.start_time(os.getpid()),
            started_at=time.time(),
            log=log_file,
            notes=list(plan.notes),
        )

    async def run(self) -> int:
        """Exit status: 0 stopped by a signal, 1 failed, 2 a process refused its configuration."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        self._log.announce([process.name for process in self._plan.processes])
        try:
            async with asyncio.TaskGroup() as group:
                for child in self.children:
                    group.create_task(self._watch(child))
                ready = group.create_task(self._become_ready())
                group.create_task(self._end_in_order(ready))
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
            records.remove(self._plan.service)
        if self._failure is not None:
            self._log.say(f"lanewise: stopped: {self._failure}", level="error")
            return self._failure.status
        self._log.say("lanewise: stopped")
        return 0

    def stop(self) -> None:
        """The first call drains, the second kills."""
        if self._stop.is_set():
            self._kill.set()
        self._stop.set()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._log.say("lanewise: killing everything")
        else:
            self._log.say(f"lanewise: draining, at most {self._stop_s:g} s (again to kill)")
        self.stop()

    async def _watch(self, child: Child) -> None:
        try:
            await child.run()
        except ChildFailed as error:
            self._failure = self._failure or ChildFailed(f"{child.plan.name}: {error}", error.status)
            self._stop.set()

    async def _become_ready(self) -> None:
        """Waits for every ready line, then for the router to say that a request would be served."""
        try:
            async with asyncio.timeout(self._plan.startup_timeout_s):
                while not all(child.state == "ready" for child in self.children):
                    self._changed.clear()
                    await self._changed.wait()
                while not await http_ok(self._plan.http, "/readyz"):  # noqa: ASYNC110 (another process is asked)
                    await asyncio.sleep(READYZ_INTERVAL_S)
        except TimeoutError:
            late = ", ".join(child.plan.name for child in self.children if child.state != "ready") or "the router"
            self._failure = ChildFailed(f"not ready after {self._plan.startup_timeout_s:g} s: {late}", 1)
            self._stop.set()
            return
        self.record.ready = True
        self._write_record()
        for line in welcome(self._plan, time.monotonic() - self._started):
            self._log.say(line)

    async def _end_in_order(self, ready: asyncio.Task[None]) -> None:
        await self._stop.wait()
        ready.cancel()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._stop_s
        for child in self.children:
            child.stop_restarting()
        routers = [child for child in self.children if child.plan.role == "router"]
        workers = [child for child in self.children if child.plan.role != "router"]
        for some, until in ((routers, deadline - max(0.0, self._stop_s - ROUTER_STOP_S)), (workers, deadline)):
            for child in some:
                child.terminate()
            await self._ended(some, until - loop.time())
        for child in self.children:
            child.kill()

    async def _ended(self, children: Iterable[Child], timeout_s: float) -> None:
        """Until all have ended, the time is up or a second signal came."""
        waits = [asyncio.create_task(child.ended.wait()) for child in children]
        killed = asyncio.create_task(self._kill.wait())
        everything = asyncio.gather(*waits)
        await asyncio.wait((everything, killed), timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        for task in (everything, killed):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _on_lost_log(self) -> None:
        self._failure = ChildFailed("nobody reads the log any more", 1)
        self._stop.set()

    def _on_line(self, child: Child, stream: Stream, line: str, record: dict[str, Any] | None) -> None:
        self._log.child(child.plan.name, stream, line, record)

    def _on_change(self, child: Child) -> None:
        name = child.plan.name
        if child.state == "ready" and not self._stop.is_set():
            self._log.say(ready_line(child, len(max((c.plan.name for c in self.children), key=len))), ready=name)
        elif child.state == "backoff":
            self._log.say(f"lanewise: {name} ended with {child.last_end}; restart {child.restarts}", level="warning")
        self._changed.set()
        self._write_record()

    def _write_record(self) -> None:
        self.record.processes = [_process_state(child) for child in self.children]
        try:
            records.write(self.record)
        except OSError as error:  # such as a full disk: `status` is then out of date, and the service goes on
            self._log.say(f"lanewise: cannot write the state file: {error.strerror}", level="warning")


def _process_state(child: Child) -> records.ProcessState:
    return records.ProcessState(
        name=child.plan.name,
        role=child.plan.role,
        address=child.plan.address,
        kv_address=child.plan.kv_address,
        pid=child.pid,
        start_time=records.start_time(child.pid) if child.pid else 0,
        incarnation=str(child.ready.get("incarnation", "")),
        device=str(child.ready.get("device", "")),
        memory_bytes=_memory(child),
        restarts=child.restarts,
        state=child.state,
    )


def _memory(child: Child) -> int:
    """What the process said it took; a router says nothing and is looked at."""
    if child.state != "ready":
        return 0
    return int(child.ready.get("memory_bytes") or 0) or rss_bytes(child.pid)


def ready_line(child: Child, width: int) -> str:
    """One line per process: what it is, where it computes and how much memory it took."""
    parts = [f"ready  {child.plan.name:<{width}}"]
    if child.plan.role == "router":
        parts += [
            "cpu",
            size(_memory(child)),
            f"http {_bare(child.ready.get('http', ''))}",
            f"grpc {child.plan.address}",
        ]
    else:
        parts += [str(child.ready.get("device", "?")), size(_memory(child))]
        parts += [str(child.ready.get("address", child.plan.address)), _phases(child.ready.get("startup_s"))]
    return "  ".join((*filter(None, parts), f"pid {child.pid}"))


def _phases(startup_s: object) -> str:
    """Where the time of the start went, as the worker says it."""
    if not isinstance(startup_s, dict):
        return ""
    return " ".join(f"{name} {float(seconds):.1f}s" for name, seconds in startup_s.items())


def _bare(address: object) -> str:
    return str(address).rpartition("//")[2]


def welcome(plan: ServicePlan, seconds: float) -> list[str]:
    """What a person needs next: the addresses, and two commands to paste."""
    http, grpc = reachable(plan.http), reachable(plan.grpc)
    message = {"role": "user", "content": "Tell me a story."}
    body = json.dumps({"model": plan.served_name, "messages": [message], "max_tokens": 64}, separators=(",", ":"))
    server = "" if grpc == "127.0.0.1:50051" else f" --server {grpc}"
    return [
        "",
        f"{plan.served_name} is ready after {seconds:.1f} s",
        f"  OpenAI  http://{http}/v1",
        f"  gRPC    {grpc}",
        *(f"  note    {note}" for note in plan.notes),
        "",
        f"  curl http://{http}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        f'  lanewise generate "Once upon a time"{server}',
        "",
    ]


async def http_ok(address: str, path: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET answers 200. By hand, since an HTTP library would cost more than the rest of the supervisor."""
    host, port = split_address(reachable(address))
    close: Callable[[], None] | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            close = writer.close
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            return (await reader.readline()).split()[1:2] == [b"200"]
    except (OSError, TimeoutError):
        return False
    finally:
        if close is not None:
            close()
