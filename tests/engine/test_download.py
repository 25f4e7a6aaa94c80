"""The download of a model against a hub on loopback, as the Job runs it: one process, killed and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lanewise
from lanewise.engine.checkpoint import Checkpoint
from lanewise.engine.sources import resolve
from lanewise.errors import ConfigError
from tests.e2e.processes import Process, free_port
from tests.engine.hub import COMMIT, REPO, Hub

FABLE = Path(lanewise.__file__).parent / "models" / "fable"
WEIGHTS = "model.safetensors"
BIG = "tokenizer.bin"  # wanted by its name, and read by nobody


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    served = {path.name: path.read_bytes() for path in FABLE.iterdir() if path.is_file() and path.name != "README.md"}
    return {**served, "original/consolidated.safetensors": b"the same once more", "README.md": b"not wanted"}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as served:
        yield served


class Job:
    """`python -m lanewise.engine.download` as the pod runs it."""

    def __init__(self, hub: Hub, into: Path, *flags: str, revision: str = "main", token: str = "") -> None:
        self.port = free_port()
        self.into = into
        self.last_words = into / f"termination-{self.port}"
        into.mkdir(parents=True, exist_ok=True)
        self.last_words.touch()
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(into / ".hf"), "HF_TOKEN": token}
        command = [sys.executable, "-m", "lanewise.engine.download", "--uri", f"hf://{REPO}", "--into", str(into)]
        command += ["--revision", revision, "--progress", f"127.0.0.1:{self.port}"]
        command += ["--termination-log", str(self.last_words), *flags]
        self.popen = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def progress(self) -> dict[str, object]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/progress", timeout=5) as reply:
                return dict(json.load(reply))
        except (urllib.error.URLError, ConnectionError):
            return {"state": "", "bytes_done": 0, "bytes_total": 0}

    def __del__(self) -> None:
        if self.popen.poll() is None:  # the test has failed
            self.popen.kill()
            self.popen.communicate()

    def end(self) -> int:
        self.out, self.err = self.popen.communicate(timeout=60)
        return self.popen.returncode

    @property
    def said(self) -> dict[str, object]:
        return dict(json.loads(self.last_words.read_text()))


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def folder(into: Path) -> Path:
    return into / "tales--fable" / COMMIT


def test_killed_half_way_it_resumes_and_a_worker_starts_from_the_folder(hub: Hub, tmp_path: Path) -> None:
    hub.files[BIG] = os.urandom(64 << 20)  # the hub's client writes 10 MB at a time
    size = len(hub.files[BIG])
    hub.bytes_per_s = size / 3
    first = Job(hub, tmp_path)
    until(lambda: first.progress()["bytes_done"] > size / 2)
    seen = first.progress()
    assert (seen["state"], seen["commit"]) == ("downloading", COMMIT)
    assert size / 2 < int(str(seen["bytes_done"])) < int(str(seen["bytes_total"]))
    first.popen.send_signal(signal.SIGKILL)
    first.end()
    with pytest.raises(ConfigError, match="not downloaded completely"):
        resolve(str(folder(tmp_path)))

    hub.bytes_per_s = 0
    sent = hub.sent[BIG]
    second = Job(hub, tmp_path)
    assert second.end() == 0, second.err
    resumed = [first for name, first in hub.gets if name == BIG]
    assert resumed[0] == 0
    assert resumed[1] > size / 3
    assert hub.sent[BIG] - sent == size - resumed[1]
    assert second.said == {"commit": COMMIT, "bytes": _wanted(hub), "path": str(folder(tmp_path))}
    names = {str(path.relative_to(folder(tmp_path))) for path in folder(tmp_path).rglob("*") if path.is_file()}
    assert names == {name for name in hub.files if "/" not in name and name != "README.md"} | {".lanewise-complete"}
    assert Checkpoint(folder(tmp_path)).full_digest() == Checkpoint(FABLE).full_digest()

    before = sorted(path.stat().st_mtime_ns for path in folder(tmp_path).rglob("*"))
    listen = f"127.0.0.1:{free_port()}"
    flags = ("--model", f"file://{folder(tmp_path)}", "--listen", listen, "--kv-cache-bytes", "8388608")
    with Process("decode_worker", tmp_path / "worker.log", *flags, "--threads", "1") as worker:
        worker.wait_ready()
    assert sorted(path.stat().st_mtime_ns for path in folder(tmp_path).rglob("*")) == before


def test_one_download_per_commit_whoever_asks(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_s = len(hub.files[WEIGHTS]) / 2
    jobs = [Job(hub, tmp_path), Job(hub, tmp_path, revision=COMMIT)]
    assert [job.end() for job in jobs] == [0, 0], [job.err for job in jobs]
    hub.down = True
    again = Job(hub, tmp_path, revision=COMMIT)  # done before: the hub is not even asked
    assert again.end() == 0, again.err
    assert sorted(name for name, _ in hub.gets) == sorted(n for n in hub.files if "/" not in n and n != "README.md")
    assert again.said == jobs[0].said == jobs[1].said


def test_damage_on_the_way_is_noticed_and_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.damage = {WEIGHTS, "config.json"}
    job = Job(hub, tmp_path)
    assert job.end() == 0, job.err
    assert [name for name, _ in hub.gets].count(WEIGHTS) == 2
    assert (folder(tmp_path) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_what_no_other_try_cures_and_what_one_may(files: dict[str, bytes], tmp_path: Path) -> None:
    with Hub(files, token="secret") as hub:
        job = Job(hub, tmp_path / "a")
        assert job.end() == 2
        assert "the token may not read it" in str(job.said["error"])
        secret = tmp_path / "token"
        secret.write_text("secret\n")
        job = Job(hub, tmp_path / "b", "--token-file", str(secret))
        assert job.end() == 0, job.err
        job = Job(hub, tmp_path / "c", revision="nowhere", token="secret")
        assert job.end() == 2
        assert "no revision 'nowhere'" in str(job.said["error"])
    with Hub({"README.md": b"no model"}) as hub:
        job = Job(hub, tmp_path / "d")
        assert job.end() == 2
        assert "has no config.json" in str(job.said["error"])
    job = Job(hub, tmp_path / "e")  # nobody listens there any more
    assert job.end() == 1, job.err
    assert "hf://tales/fable at main" in str(job.said["error"])


def _wanted(hub: Hub) -> int:
    return sum(len(data) for name, data in hub.files.items() if "/" not in name and name != "README.md")
