"""Chunks that go from the memory of one GPU to that of another, between processes of one host (CUDA IPC).

As with any neighbour's memory (neighbour.py), a CHUNK says where its bytes lie, and the decode worker copies them into
its pages and checksums them there; here both are done by its GPU. What it needs to reach the sender's memory, handles
of the driver, lies behind the token in the sender's process, and is read there by who may read that process.
Owns: what a worker shows to its neighbours of its GPU's memory, which of theirs is open here, and the bounds of it: a
copy from beyond them would end this worker's use of its GPU. Must not: import torch (`engine/device_memory.py` does).
"""

from __future__ import annotations

import logging
import random
import socket
import struct
from dataclasses import replace
from typing import Protocol

import numpy as np

from lanewise.transfer import messages as m
from lanewise.transfer import neighbour
from lanewise.transfer.inlet import Sink
from lanewise.transfer.neighbour import MAX_RUNS, Areas, NotRuns
from lanewise.transfer.protocol import Write
from lanewise.transfer.records import Limits, Pages, PageStore
from lanewise.transfer.trial import Refer
from lanewise.transfer.word_sum import packed, word_sum

log = logging.getLogger("lanewise.transfer")

_ENTRY = struct.Struct("<QQ64sQ")
_ENTRIES = 2  # the pool and the block for tests
CARD_BYTES = _ENTRIES * _ENTRY.size
_TOP = 1 << 62


class Device(Protocol):
    """The memory of a GPU, and the GPU as far as it is needed here. OSError for whatever it refuses; what it does is
    over when a method returns. Areas are whole words of 4 bytes."""

    block: tuple[int, int]
    """Address and size of a block for tests, of which nothing is kept."""
    exports: list[tuple[int, int, bytes, int]]
    """Address and size of the pool and the block, the handle of the allocation each lies in, and how far into it."""
    piece_bytes: int
    """Of the smallest piece of many that a chunk lies in."""

    def places(self, pages: Pages, tokens: range, layers: range, heads: range) -> Areas | None:
        """As `PageStore.views`."""

    def fill(self, data: bytes) -> None:
        """Into the block, from its start."""

    def checksum(self, areas: Areas) -> int: ...
    def copy(self, source: Areas, target: Areas) -> None: ...
    def wipe(self, areas: Areas) -> None: ...

    def open(self, handle: bytes) -> tuple[int, int]:
        """Address and size here of memory that another process has exported; not twice before it is closed."""

    def close(self, address: int) -> None: ...


def area(address: int, num_bytes: int) -> Areas:
    return np.array([[address, num_bytes]], np.uint64)


def checked(device: Device | None) -> Device | None:
    """The device, with something in its block, where it copies and adds up rightly; None: not to be used."""
    if device is None:
        return None
    address, num_bytes = device.block
    pattern = random.Random(0).randbytes(num_bytes)  # nothing secret
    half = num_bytes // 2
    first, second = area(address, half), area(address + half, half)
    try:
        device.fill(pattern)
        rightly = packed(device.checksum(area(address, num_bytes))) == word_sum(pattern)
        device.copy(first, second)
        rightly &= packed(device.checksum(second)) == word_sum(pattern[:half])
        device.wipe(second)
        rightly &= packed(device.checksum(second)) == word_sum(bytes(half))
        device.fill(pattern)
    except (OSError, ValueError) as error:
        log.error("no KV by CUDA IPC: the test of this GPU's copies failed: %s", error)
        return None
    if not rightly:
        log.error("no KV by CUDA IPC: this GPU's copies or checksums are not what they should be")
    return device if rightly else None


def fitting(limits: Limits, store: PageStore) -> Limits:
    """With references to no more bytes than MAX_RUNS pieces surely hold, where the pool lies in a GPU's memory."""
    if store.device_memory is None:
        return limits
    # Of each layer's K and V, the first and the last piece may be smaller than the others.
    pieces = max(1, MAX_RUNS - 4 * store.layout.num_layers)
    most = min(limits.referred_bytes, pieces * store.device_memory.piece_bytes)
    return replace(limits, referred_bytes=most)


def place(device: Device | None) -> bytes:
    """Equal in workers that may be able to read each other's KV: of GPUs' memory here only those on GPUs."""
    return neighbour.place("" if device is None else "GPU")


def card(device: Device | None) -> bytes:
    """What a neighbour needs to reach this process's memory, beside what the processes themselves may."""
    if device is None:
        return b""
    return b"".join(_ENTRY.pack(at, size, handle, offset) for at, size, handle, offset in device.exports)


def refer_to(device: Device) -> Refer:
    """For test blocks. Several partners may be tested at once: nobody writes to the block, and who has it copied wipes
    its own before."""

    def refer(block: memoryview) -> tuple[bytes, bytes]:
        there = area(device.block[0], len(block) & ~3)
        return neighbour.packed(there), packed(device.checksum(there))

    return refer


class Openings:
    """Allocations of other processes that are open here; the driver opens each once, several connections may use it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._open: dict[bytes, tuple[int, int]] = {}
        self._users: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, handle: bytes) -> tuple[int, int]:
        """Address and size here. OSError."""
        if handle not in self._open:
            self._open[handle] = self._device.open(handle)
        self._users[handle] = self._users.get(handle, 0) + 1
        return self._open[handle]

    def close(self, handle: bytes) -> None:
        self._users[handle] -= 1
        if not self._users[handle]:
            del self._users[handle]
            address, _ = self._open.pop(handle)
            try:
                self._device.close(address)
            except OSError as error:
                log.warning("GPU memory of a process that may be gone: %s", error)


class Mapped:
    """The memory that one neighbour shows of its GPU."""

    def __init__(self, openings: Openings, shown: bytes) -> None:
        """`shown`: its `card`. OSError where it cannot be opened, or has not what it says."""
        self._openings = openings
        self._handles: list[bytes] = []
        self._areas: list[tuple[int, int, int]] = []  # address there, size, address here
        try:
            for there, size, handle, offset in _ENTRY.iter_unpack(shown):
                here, most = openings.open(handle)
                self._handles.append(handle)
                if not 0 < there < _TOP or not 0 < size <= most - offset or offset % 4:
                    raise OSError(f"{size} bytes at {offset} of {most}: not what was shown")
                self._areas.append((there, size, here + offset))
        except OSError:
            self.close()
            raise

    def here(self, areas: Areas) -> Areas:
        """Where these parts of its memory are in this process; NotRuns for what it has not shown, or not in words."""
        found = np.zeros_like(areas)
        starts, ends = areas[:, 0], areas[:, 0] + areas[:, 1]
        for there, size, here in self._areas:
            inside = (starts >= np.uint64(there)) & (ends <= np.uint64(there + size))
            found[inside, 0] = starts[inside] - np.uint64(there) + np.uint64(here)
        found[:, 1] = areas[:, 1]
        if not found.all() or (found % 4).any():
            raise NotRuns("references beyond the memory that was shown")
        return found

    def close(self) -> None:
        """Nothing of it is read any more."""
        while self._handles:
            self._openings.close(self._handles.pop())
        self._areas.clear()


class DeviceSink(Sink):
    """A chunk or test block that this GPU copies, at once: nothing of it comes by the connection."""

    def __init__(
        self,
        device: Device,
        source: Areas,
        target: Areas,
        *,
        write: Write | None = None,
        probe: m.Probe | None = None,
    ) -> None:
        """Areas of this process; `target` is to be checksummed where it is."""
        super().__init__(int(source[:, 1].sum()), write, probe=probe)
        self._device = device
        self._source = source
        self._target: Areas | None = target
        self._crc = b""

    @property
    def at_hand(self) -> bool:
        return True

    @property
    def checksum(self) -> bytes:
        return self._crc

    def take(self, sock: socket.socket, scratch: memoryview) -> int:
        got, self.left = self.left, 0
        target = self._target
        if target is None or got != int(target[:, 1].sum()):
            self.failed = True
            return got
        try:
            if self.probe:
                self._device.wipe(target)  # what lies there from the last test must not do for this one
            self._device.copy(self._source, target)
            self._crc = packed(self._device.checksum(target))
        except OSError as error:
            log.warning("KV by CUDA IPC: %s", error)
            self.failed = True
        return got

    def wipe(self) -> None:
        if self._target is not None and self.write is not None:
            try:
                self._device.wipe(self._target)
            except OSError as error:  # the GPU is of no use any more, to its engine either
                log.error("pages that hold what was not verified: %s", error)

    def let_go(self) -> None:
        self._target = None
        super().let_go()
