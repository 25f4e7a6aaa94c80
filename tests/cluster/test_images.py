"""What deploy/build-root.sh puts into a worker image, built for real: a worker starts from it without a compiler.

Long (torch is downloaded); only in `make soak`. The control image is what every other test here runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kube import contents

BUILD_DEADLINE_S = 1800
START_DEADLINE_S = 120
PACKAGES, NATIVE = "opt/lanewise", "opt/lanewise-native"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(BUILD_DEADLINE_S + 2 * START_DEADLINE_S)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("worker")
    wheel = contents.build_wheel(folder)
    command = ["sh", str(contents.BUILD_ROOT), "worker", str(wheel), str(folder / "root")]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=BUILD_DEADLINE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    yield folder / "root"
    shutil.rmtree(folder / "root")  # five gigabytes, which pytest would keep for its last three runs


def test_a_worker_starts_from_it_with_native_kernels(root: Path, tmp_path: Path) -> None:
    env = {"PATH": "/none", "HOME": str(tmp_path), "LANEWISE_NATIVE_DIR": str(root / NATIVE)}
    python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"  # which knows no packages
    command = [python, "-s", "-m", "lanewise.decode_worker", "--threads", "1", "--kernels", "native"]
    with subprocess.Popen(
        command,
        env=env | {"PYTHONPATH": str(root / PACKAGES)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as worker:
        try:
            said = list(until_ready(worker))
        finally:
            worker.terminate()
            worker.wait(START_DEADLINE_S)
    assert not [line for line in said if line.get("event") == "native_kernels_missing"]
    assert worker.returncode == 0


def until_ready(worker: subprocess.Popen[str]) -> Iterator[dict[str, object]]:
    assert worker.stdout is not None
    seen = []
    for line in worker.stdout:
        seen.append(line)
        event = json.loads(line) if line.startswith("{") else {}
        yield event
        if event.get("event") == "ready":
            return
    pytest.fail("the worker ended: " + "".join(seen[-20:]))
