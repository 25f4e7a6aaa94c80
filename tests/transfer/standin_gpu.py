"""A GPU for tests: its driver is the library of standin/, and numpy does what its kernels would."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lanewise.kernels.cuda_ipc import Driver
from lanewise.transfer.neighbour import address_of
from lanewise.transfer.word_sum import word_sum

SOURCE = Path(__file__).with_name("standin") / "cuda.c"


def build(directory: Path) -> str:
    """The library's path; skips the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = directory / "libstandin.so"
    subprocess.run([compiler, "-O1", "-fPIC", "-shared", "-o", str(target), str(SOURCE)], check=True, timeout=60)
    return str(target)


def allocate(library: str, num_bytes: int) -> np.ndarray:
    """Memory of the device, as this process sees it; never freed."""
    call = ctypes.CDLL(library).standin_allocate
    call.restype, call.argtypes = ctypes.c_uint64, [ctypes.c_size_t]
    address = call(num_bytes)
    assert address
    return np.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), np.uint8)


def opened(library: str) -> int:
    """Allocations of other processes that are open in this one."""
    return int(ctypes.CDLL(library).standin_opened())


class StandIn:
    """`lanewise.transfer.ipc_link.Device` with a pool of numpy's."""

    def __init__(self, library: str, store, block_bytes: int = 65536) -> None:
        self.library = library
        self.driver = Driver(0, library)
        self.copied = 0  # bytes
        self.broken: set[str] = set()  # what fails
        self._pieces = store.pieces
        pool, block = allocate(library, store.pool.nbytes), allocate(library, block_bytes)
        store.pool = pool.reshape(store.pool.shape)
        store.device_memory = self
        self.block = block.ctypes.data, block_bytes
        areas = ((pool.ctypes.data, pool.nbytes), self.block)
        self.exports = [(*area, *self.driver.export(area[0])) for area in areas]
        self.piece_bytes = store.pool.shape[-1]

    def places(self, pages, tokens, layers, heads):
        parts = self._pieces(pages, tokens, layers, heads)
        return np.array([(address_of(part), len(part)) for part in parts], np.uint64)

    def fill(self, data: bytes) -> None:
        ctypes.memmove(self.block[0], data, len(data))

    def checksum(self, areas) -> int:
        self._may("checksum")
        return int.from_bytes(word_sum(self._bytes(areas)), "little")

    def copy(self, source, target) -> None:
        self._may("copy")
        data, at = self._bytes(source), 0
        assert len(data) == int(target[:, 1].sum())
        for address, length in target.tolist():
            ctypes.memmove(address, data[at : at + length], length)
            at += length
        self.copied += len(data)

    def wipe(self, areas) -> None:
        for address, length in areas.tolist():
            ctypes.memset(address, 0, length)

    def open(self, handle: bytes) -> tuple[int, int]:
        return self.driver.open(handle)

    def close(self, address: int) -> None:
        self.driver.close(address)

    def _may(self, what: str) -> None:
        if what in self.broken:
            raise OSError(f"GPU: no {what}")

    @staticmethod
    def _bytes(areas) -> bytes:
        assert not (areas % 4).any()
        return b"".join(ctypes.string_at(address, length) for address, length in areas.tolist())
