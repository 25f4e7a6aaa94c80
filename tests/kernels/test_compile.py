"""What the interpreter runs, the compiler takes: every kernel becomes machine code for an H200, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")  # not imported: that decides how it runs
def test_every_kernel_compiles_for_an_h200(tmp_path: Path) -> None:
    command = [sys.executable, "tests/kernels/compile_all.py", "--dtype", "bf16"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 11
