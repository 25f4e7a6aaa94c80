"""The file a running `lanewise up` keeps for `status`, `down` and `generate`: one JSON per service.

Owns: where it is, its atomic replacement, and telling a live record from one that a crash left behind.
Must not: signal or start processes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class ProcessState:
    name: str
    role: str
    address: str
    kv_address: str = ""
    pid: int = 0  # 0: not running at the moment
    start_time: int = 0
    incarnation: str = ""
    device: str = ""
    memory_bytes: int = 0
    restarts: int = 0
    state: str = "starting"  # starting, ready, backoff, stopped


@dataclass(slots=True)
class ServiceState:
    service: str
    served_name: str
    model: str
    http: str
    grpc: str
    pid: int  # of the supervisor
    start_time: int  # of that pid, so that a reused pid is not mistaken for it
    started_at: float  # Unix time
    ready: bool = False
    log: str = ""  # file of a detached service
    notes: list[str] = field(default_factory=list)
    processes: list[ProcessState] = field(default_factory=list)

    @property
    def live(self) -> bool:
        return is_alive(self.pid, self.start_time)


def state_dir() -> Path:
    """`$LANEWISE_STATE_DIR`, else the XDG state directory."""
    explicit = os.environ.get("LANEWISE_STATE_DIR")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "lanewise"


def write(state: ServiceState) -> None:
    """Replaces the record in one step: a reader sees the old one or the new one."""
    directory = state_dir()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"{state.service}.json"
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(json.dumps(asdict(state), indent=1))
    fresh.replace(path)


def remove(service: str) -> None:
    (state_dir() / f"{service}.json").unlink(missing_ok=True)


def read(service: str) -> ServiceState | None:
    return _load(state_dir() / f"{service}.json")


def live_services() -> list[ServiceState]:
    """Services whose supervisor runs, by name. Records of dead supervisors are passed over, not removed."""
    found = (_load(path) for path in sorted(state_dir().glob("*.json")))
    return [state for state in found if state is not None and state.live]


def _load(path: Path) -> ServiceState | None:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        processes = [ProcessState(**process) for process in data.pop("processes")]
        return ServiceState(**data, processes=processes)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # gone, or of another version: nobody's live service


def start_time(pid: int) -> int:
    """When `pid` started, in kernel ticks; 0 where it does not run (a zombie does not) or nobody can tell."""
    try:
        # The name in parentheses may hold spaces and parentheses itself; fields count from after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_alive(pid: int, started: int) -> bool:
    """Whether `pid` is still the process that started at `started`."""
    if pid <= 0:
        return False
    if Path("/proc/self/stat").exists():
        now = start_time(pid)
        return now != 0 and now == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
