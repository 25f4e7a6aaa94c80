"""One supervised process: start, read its lines, restart with back-off, end it with all its descendants.

Owns: the process group, the death signal (a supervisor that is killed takes its children along), the back-off.
Must not: know roles or flags, print, or decide when the service as a whole is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from lanewise.local.plan import ProcessPlan

BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
HEALTHY_AFTER_S = float(os.environ.get("LANEWISE_HEALTHY_AFTER_S", "10"))
"""A process that was ready for this long starts its next back-off at 0; campaigns that kill in turn shorten it."""
MAX_FIRST_STARTS = 5  # a process that never became ready is not tried for ever
CONFIG_STATUS = 2
MAX_LINE_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1

Stream = Literal["stdout", "stderr"]
OnLine = Callable[["Child", Stream, str, "dict[str, Any] | None"], None]


def backoff_s(failures: int) -> float:
    """Wait before the restart that follows `failures` earlier failures in a row."""
    return BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]


class ChildFailed(Exception):
    """A child that no restart will help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Child:
    """`run()` until `stop_restarting()`; every change of state calls `on_change`."""

    def __init__(self, plan: ProcessPlan, on_line: OnLine, on_change: Callable[[Child], None]) -> None:
        self.plan = plan
        self.state = "starting"
        self.pid = 0
        self.restarts = 0
        self.ready: dict[str, Any] = {}  # the ready line of the current process
        self.ended = asyncio.Event()
        self.last_end = ""  # how the process before this one ended
        self._on_line = on_line
        self._on_change = on_change
        self._stopping = asyncio.Event()
        self._ready_at: float | None = None
        self._ever_ready = False
        self._tail: deque[str] = deque(maxlen=8)
        self._transport: asyncio.SubprocessTransport | None = None

    async def run(self) -> None:
        failures = 0
        starts = 0
        try:
            while not self._stopping.is_set():
                starts += 1
                status, healthy_s = await self._run_once()
                self.last_end = _how(status)
                if self._stopping.is_set():
                    break
                if status == CONFIG_STATUS:
                    raise ChildFailed(self._last_words(status), CONFIG_STATUS)
                if not self._ever_ready and starts >= MAX_FIRST_STARTS:
                    raise ChildFailed(f"gave up after {starts} starts: {self._last_words(status)}", 1)
                failures = 0 if healthy_s >= HEALTHY_AFTER_S else failures
                await self._wait_before_restart(backoff_s(failures))
                failures += 1
        finally:
            self.pid = 0
            self._change("stopped")
            self.ended.set()

    def stop_restarting(self) -> None:
        self._stopping.set()

    def terminate(self) -> None:
        """Asks the process to drain and end. Its own children are its own affair until it is gone."""
        self.stop_restarting()
        if self._transport is not None:
            with contextlib.suppress(ProcessLookupError):
                self._transport.terminate()

    def kill(self) -> None:
        self.stop_restarting()
        self._kill_group()

    async def _run_once(self) -> tuple[int, float]:
        """(exit status, seconds it was ready)."""
        loop = asyncio.get_running_loop()
        self.ready, self._ready_at = {}, None
        self._tail.clear()
        try:
            transport, output = await self._spawn(loop)
        except OSError as error:
            raise ChildFailed(f"cannot start {self.plan.argv[0]}: {error.strerror}", 1) from error
        try:
            if self._stopping.is_set():
                self.terminate()  # asked to stop while it was being started
            await output.exited.wait()
            self._kill_group()  # descendants that outlived it would hold its port, and its pipes
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(output.closed.wait(), 2.0)
        finally:
            self._kill_group()
            transport.close()
        self.pid = 0
        status = transport.get_returncode()
        return 0 if status is None else status, loop.time() - self._ready_at if self._ready_at is not None else 0.0

    async def _spawn(self, loop: asyncio.AbstractEventLoop) -> tuple[asyncio.SubprocessTransport, _Output]:
        return await loop.subprocess_exec(
            lambda: _Output(self._started, self._take_line),
            *self.plan.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **self.plan.environment},
            # A group of its own: the terminal's Ctrl-C reaches the supervisor only, which drains in order.
            process_group=0,
            preexec_fn=_die_with(os.getpid()),
        )

    def _started(self, transport: asyncio.SubprocessTransport) -> None:
        """Called before the first line is taken, which may be long before `_spawn` gets to run again."""
        self._transport, self.pid = transport, transport.get_pid()
        self._change("starting")

    async def _wait_before_restart(self, delay_s: float) -> None:
        self.restarts += 1
        self._change("backoff")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay_s)

    def _take_line(self, stream: Stream, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        if not line:
            return
        record = _json_object(line)
        if record is None and stream == "stderr":
            self._tail.append(line)
        elif record is not None and record.get("level") in ("error", "critical"):
            self._tail.append(str(record.get("event", line)))
        if record is not None and record.get("event") == "ready" and stream == "stdout":
            self.ready, self._ready_at, self._ever_ready = record, asyncio.get_running_loop().time(), True
            self._change("ready")
        self._on_line(self, stream, line, record)

    def _change(self, state: str) -> None:
        self.state = state
        self._on_change(self)

    def _kill_group(self) -> None:
        if self._transport is not None and self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _last_words(self, status: int) -> str:
        return "\n".join(self._tail) if self._tail else f"ended with {_how(status)} and no message"


def _how(status: int) -> str:
    try:
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    except ValueError:
        return f"signal {-status}"


class _Output(asyncio.SubprocessProtocol):
    """The pipes and the end of one process, apart: descendants may hold the pipes open after its end."""

    def __init__(
        self,
        started: Callable[[asyncio.SubprocessTransport], None],
        take_line: Callable[[Stream, bytes], None],
    ) -> None:
        self.exited = asyncio.Event()
        self.closed = asyncio.Event()
        self._started = started
        self._take_line = take_line
        self._pending = {1: b"", 2: b""}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._started(transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Lines of any length; one that never ends is cut, so that a child cannot fill this process."""
        *lines, pending = (self._pending[fd] + data).split(b"\n")
        if len(pending) > MAX_LINE_BYTES:
            lines, pending = [*lines, pending], b""
        self._pending[fd] = pending
        for line in lines:
            self._take_line("stdout" if fd == 1 else "stderr", line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if self._pending.get(fd):
            self.pipe_data_received(fd, b"\n")

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


def _json_object(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child runs between fork and exec, so that it never outlives a supervisor that was killed."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def arm() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the signal was armed
            os._exit(1)

    return arm
