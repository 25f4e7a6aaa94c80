"""Memory of another process of this host, read without that process doing anything for it (process_vm_readv).

Owns: how parts of memory are named in a message, and reading them. Must not: believe what was read (the caller checks
it against a checksum), or write another process's memory.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import hmac
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_RUNS = 1024
"""Parts that one message may name: they fit its header, and one system call."""

_RUN = np.dtype("<u8")  # twice: address and length
RUN_BYTES = 2 * _RUN.itemsize
_FORM = "runs of 2 x 8 bytes"
_TOP = 1 << 62  # beyond any address, and what is added to it stays within 64 bits
_PR_SET_PTRACER = 0x59616D61

Areas = NDArray[np.uint64]
"""Addresses and lengths, one row each: what the system calls an array of iovec."""

_libc = ctypes.CDLL(None, use_errno=True)
_readv = getattr(_libc, "process_vm_readv", None)  # Linux
if _readv is not None:
    _readv.restype = ctypes.c_ssize_t
    _area = (ctypes.c_void_p, ctypes.c_ulong)
    _readv.argtypes = (ctypes.c_int, *_area, *_area, ctypes.c_ulong)


class NotRuns(ValueError):
    """Bytes that name no parts of memory, or more than was allowed."""


def place(kind: str = "") -> bytes:
    """Equal in processes that may be able to read each other's memory, and name it alike; empty: this one can read no
    other's. `kind`: of memory, where that is not all the same."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read()
        names = os.readlink("/proc/self/ns/pid")
    except OSError:
        return b""
    return hashlib.sha256(f"{boot} {names} {os.getuid()}{kind} {_FORM}".encode()).digest()[:16] if _readv else b""


def is_own(pid: int) -> bool:
    """A process is no neighbour of its own: nobody outside may have it read what it keeps."""
    return pid == os.getpid()


def open_to_siblings() -> None:
    """Where the kernel lets only ancestors look into a process (Yama), lets this one's siblings too."""
    if prctl := getattr(_libc, "prctl", None):
        prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)  # refused where nothing forbids it


def address_of(part: memoryview | bytearray) -> int:
    """Of writable memory; valid as long as its owner lives."""
    return ctypes.addressof(ctypes.c_char.from_buffer(part))


def areas_of(parts: Sequence[memoryview | bytearray]) -> Areas:
    """Where parts of this process's memory are: as they know themselves (`PageStore.views`), else part by part."""
    areas: Areas | None = getattr(parts, "areas", None)
    return np.array([(address_of(part), len(part)) for part in parts], np.uint64) if areas is None else areas


def pack(parts: Sequence[memoryview | bytearray]) -> bytes:
    """These parts of this process's memory, as `unpack` reads them; at most MAX_RUNS."""
    return packed(areas_of(parts))


def packed(areas: Areas) -> bytes:
    """Areas likewise."""
    return areas.astype(_RUN, copy=False).tobytes()


def unpack(data: bytes, max_bytes: int) -> tuple[Areas, int]:
    """The areas and how many bytes they are together; raises NotRuns."""
    if not data or len(data) % RUN_BYTES or len(data) > MAX_RUNS * RUN_BYTES:
        raise NotRuns(f"{len(data)} bytes of references")
    areas = np.frombuffer(data, _RUN).reshape(-1, 2)
    address, longest = areas.max(axis=0).tolist()
    if not areas.all() or address > _TOP or longest > max_bytes:  # each length first: the sum of any might not fit
        raise NotRuns(f"references to no memory, or to more than {max_bytes} bytes")
    total = int(areas[:, 1].sum())
    if total > max_bytes:
        raise NotRuns(f"references to {total} bytes")
    return areas, total


class Neighbour:
    """A process whose memory this one may read."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @classmethod
    def known_by(cls, pid: int, address: int, token: bytes) -> Neighbour | None:
        """The process that says of itself that it is `pid` and keeps the token we gave it at this address.

        None where that is not so, or cannot be seen: a stranger must not make us read whatever process he names."""
        if pid <= 0 or is_own(pid) or not 0 < address <= _TOP:
            return None
        seen = bytearray(len(token))
        neighbour = cls(pid)
        try:
            neighbour.read(np.array([[address, len(token)]], np.uint64), [memoryview(seen)], len(token))
        except OSError:
            return None
        return neighbour if hmac.compare_digest(seen, token) else None

    def read(self, areas: Areas, into: Sequence[memoryview], num_bytes: int) -> None:
        """Fills `into` with these areas, of `num_bytes` together both; OSError where not all could be read.

        At most MAX_RUNS of each."""
        if _readv is None:
            raise OSError(errno.ENOSYS, "no memory of other processes can be read here")
        mine = areas_of(into)
        got = _readv(self.pid, mine.ctypes.data, len(mine), areas.ctypes.data, len(areas), 0)
        if got < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        if got != num_bytes:
            raise OSError(errno.EFAULT, f"{got} bytes could be read of process {self.pid}")


class Reading:
    """Areas of a neighbour's memory, read from the first to the last in as many steps as the reader likes."""

    def __init__(self, neighbour: Neighbour, areas: Areas, total: int) -> None:
        """`total`: bytes of all areas."""
        self._neighbour = neighbour
        self._areas = areas
        self._total = total
        self._at = 0

    def fill(self, into: Sequence[memoryview]) -> None:
        """Fills these parts with what comes next; OSError where it cannot be read."""
        start, stop = self._at, self._at + sum(map(len, into))
        if start == 0 and stop == self._total:
            self._neighbour.read(self._areas, into, self._total)
            self._at = stop
            return
        if stop > self._total:
            raise OSError(errno.EFAULT, f"{stop} bytes of {self._total} that were referred to")
        ends = np.cumsum(self._areas[:, 1])
        first, last = np.searchsorted(ends, [start, stop - 1], "right")
        areas = self._areas[first : last + 1].copy()
        areas[-1, 1] -= ends[last] - np.uint64(stop)
        skipped = np.uint64(start) - (ends[first] - self._areas[first, 1])
        areas[0, 0] += skipped
        areas[0, 1] -= skipped
        self._neighbour.read(areas, into, stop - start)
        self._at = stop
