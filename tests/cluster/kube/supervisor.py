"""Process 1 of a cluster's namespaces: makes its mounts private, starts daemons on request, restarts those that die.

Owns: everything that runs in the namespaces; when it exits, the kernel ends all of it, pods included.
Must not: know what the daemons are, import anything but the standard library (it is run as a file).
Usage: supervisor.py ROOT LOCK_FD owned|detached    (owned: it ends when its standard input is closed, with its owner)

Requests are one JSON line each on ROOT/control.sock: {"op": "start", "name", "argv"}, {"op": "status"},
{"op": "signal", "name", "signal"}, {"op": "stop", "name"}. The answer is one JSON line.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

RESTART_DELAY_S = 0.2
REQUEST_DEADLINE_S = 2.0
PRIVATE = ("/run", "/var/lib", "/var/log")
"""Folders that the daemons write to by name; each cluster gets an empty one."""
SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}
"""Machine-wide settings that a kubelet wants; it finds them in files of its own instead of changing the machine."""


@dataclass
class Daemon:
    name: str
    argv: list[str]
    pid: int | None = None
    due: float | None = None
    starts: int = 0


class Supervisor:
    def __init__(self, root: Path, owned: bool) -> None:
        self.root = root
        self.owned = owned
        self.daemons: dict[str, Daemon] = {}
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.wake, self.poke = socket.socketpair()

    def run(self) -> None:
        self._isolate()
        for end in (self.wake, self.poke):
            end.setblocking(False)
        signal.set_wakeup_fd(self.poke.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _nothing)
        signal.signal(signal.SIGTERM, _leave)
        self.server.bind(str(self.root / "control.sock"))
        self.server.listen(16)
        selector = selectors.DefaultSelector()
        selector.register(self.server, selectors.EVENT_READ)
        selector.register(self.wake, selectors.EVENT_READ)
        if self.owned:
            selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(self._pause())]
            if sys.stdin in ready:
                return
            if self.wake in ready:
                self.wake.recv(4096)
            self._reap()
            self._restart()
            if self.server in ready:
                self._serve()

    def _isolate(self) -> None:
        _command("mount", "--make-rprivate", "/")
        for folder in PRIVATE:
            if not self.root.is_relative_to(folder):
                _command("mount", "-t", "tmpfs", "-o", "mode=755", "none", folder)
        for folder in ("/run/netns", "/run/lock"):
            Path(folder).mkdir(parents=True, exist_ok=True)
        for key, value in SYSCTLS.items():
            file = self.root / f"sysctl-{key.rsplit('/', 1)[1]}"
            file.write_text(value + "\n")
            _command("mount", "--bind", str(file), f"/proc/sys/{key}")
        _command("mount", "--make-rshared", "/")
        _command("ip", "link", "set", "lo", "up")

    def _pause(self) -> float | None:
        due = [daemon.due for daemon in self.daemons.values() if daemon.due is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _reap(self) -> None:
        """Collects every dead child, the daemons' orphans included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for daemon in self.daemons.values():
                if daemon.pid == pid:
                    daemon.pid, daemon.due = None, time.monotonic() + RESTART_DELAY_S
                    print(f"{time.time():.3f} {daemon.name} ended: {os.waitstatus_to_exitcode(status)}", flush=True)

    def _restart(self) -> None:
        for daemon in self.daemons.values():
            if daemon.due is not None and daemon.due <= time.monotonic():
                self._start(daemon)

    def _start(self, daemon: Daemon) -> None:
        log = str(self.root / "log" / f"{daemon.name}.log")
        files = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        defaults = [signal.SIGCHLD, signal.SIGTERM]
        daemon.pid = os.posix_spawnp(
            daemon.argv[0], daemon.argv, os.environ, file_actions=files, setsid=True, setsigdef=defaults
        )
        daemon.due = None
        daemon.starts += 1

    def _serve(self) -> None:
        connection, _ = self.server.accept()
        with connection:
            connection.settimeout(REQUEST_DEADLINE_S)
            try:
                with connection.makefile("rw") as stream:
                    request = stream.readline()
                    if request:  # else somebody only wanted to know who we are
                        stream.write(json.dumps(self._answer(json.loads(request))) + "\n")
            except (OSError, ValueError) as error:
                print(f"request failed: {error!r}", flush=True)

    def _answer(self, request: dict[str, object]) -> dict[str, object]:
        name = str(request.get("name", ""))
        try:
            if request["op"] == "start":
                argv = request["argv"]
                assert isinstance(argv, list)
                if name in self.daemons:
                    return {"error": f"{name} was started before"}
                daemon = Daemon(name, [str(part) for part in argv])
                self._start(daemon)  # fails where there is no such program; then it is not ours to restart
                self.daemons[name] = daemon
            elif request["op"] == "signal":
                pid = self.daemons[name].pid
                if pid is not None:
                    os.kill(pid, int(str(request["signal"])))
            elif request["op"] == "stop":
                pid = self.daemons.pop(name).pid  # from now on nobody starts it again
                if pid is not None:
                    os.kill(pid, signal.SIGTERM)
        except (KeyError, OSError, AssertionError) as error:
            return {"error": f"{request}: {error!r}"}
        return {daemon.name: {"pid": daemon.pid, "starts": daemon.starts} for daemon in self.daemons.values()}


def _command(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=30, stdin=subprocess.DEVNULL)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler has to exist for the wake-up to come."""


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(0)


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[2]), False)  # the lock is for this process alone
    Supervisor(Path(sys.argv[1]), owned=sys.argv[3] == "owned").run()
