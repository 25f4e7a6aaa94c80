"""Real child processes with a private state directory, and proof that none is left."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lanewise.local import state

FAKES = Path(__file__).parent / "fakes"


def poll(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def pids_with(marker: str) -> list[int]:
    """Running processes whose environment carries the marker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if marker.encode() in environment and state.start_time(int(entry.name)):
                found.append(int(entry.name))
    return found


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A state directory and an environment marker of this test's own; at the end no process may carry the marker."""
    directory = tmp_path / "state"
    marker = f"LANEWISE_STATE_DIR={directory}"
    monkeypatch.setenv("LANEWISE_STATE_DIR", str(directory))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    yield marker
    try:
        poll(lambda: not pids_with(marker), "every child gone", 5.0)
    finally:
        for pid in pids_with(marker):
            os.kill(pid, 9)
