"""The calls of CUDA's driver, made to a library that stands in for it and is as strict as the documentation."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from lanewise.kernels.cuda_ipc import HANDLE_BYTES, Driver
from tests.transfer.standin_gpu import allocate, build, opened


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("standin"))


def depth(library: str) -> int:
    return int(ctypes.CDLL(library).standin_depth())


def test_memory_of_another_process_is_opened_and_closed(library):
    mine = allocate(library, 4096)
    mine[:] = 7
    driver = Driver(0, library)
    handle, offset = driver.export(mine.ctypes.data + 100)
    assert (len(handle), offset) == (HANDLE_BYTES, 100)
    script = (
        "import ctypes, sys\n"
        "from lanewise.kernels.cuda_ipc import Driver\n"
        "driver = Driver(0, sys.argv[1])\n"
        "at, size = driver.open(bytes.fromhex(sys.argv[2]))\n"
        "ctypes.memset(at + 100, 9, 4)\n"
        "driver.close(at)\n"
        "print(size, flush=True)\n"
        "try:\n"
        "    driver.close(at)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, library, handle.hex()], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.splitlines() == ["4096", "cuIpcCloseMemHandle: invalid argument (1)"]
    assert mine[99:105].tolist() == [7, 9, 9, 9, 9, 7]
    assert depth(library) == 0


def test_what_the_driver_refuses_is_an_error_in_its_words(library, monkeypatch):
    driver = Driver(0, library)
    mine = allocate(library, 4096)
    handle, _ = driver.export(mine.ctypes.data)
    for refused, words in (
        (lambda: driver.export(4096), "invalid argument"),
        (lambda: driver.open(handle), "invalid device context"),  # a process does not open its own
        (lambda: driver.open(bytes(HANDLE_BYTES)), "invalid resource handle"),
        (lambda: driver.open(handle[:-1]), "a handle of 63 bytes"),
        (lambda: driver.close(mine.ctypes.data), "invalid argument"),
        (lambda: Driver(1, library), "no CUDA-capable device"),
        (lambda: Driver(0, "libc.so.6"), "has no cuInit"),
        (lambda: Driver(0, "libof-nobody.so"), "libof-nobody.so"),
    ):
        with pytest.raises(OSError, match=words):
            refused()
    monkeypatch.setenv("LANEWISE_STANDIN_OWN", "1")
    at, _ = driver.open(handle)
    with pytest.raises(OSError, match="already mapped"):
        driver.open(handle)
    assert opened(library) == 1
    driver.close(at)
    assert (opened(library), depth(library)) == (0, 0)
