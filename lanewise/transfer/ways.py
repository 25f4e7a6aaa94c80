"""How the bytes of a chunk leave a prefill worker: from pages or gathered, by a direct connection, a ZeroMQ socket or
a process group.

Owns: the buffers in between. What is gathered is gathered once per sending, so pages are free the moment a transfer
ends; of pages that are sent from where they lie, `release` tells the end. A partner that reads pages itself may do so
later: what it reads then is not what was checksummed, and it takes it for damaged.
Must not: decide which chunk goes, or which way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import zmq
from numpy.typing import NDArray

from lanewise.policy.blocks import KVLayout
from lanewise.transfer import direct, neighbour
from lanewise.transfer.buffers import Buffers
from lanewise.transfer.bundles import MORE, NOBLOCK
from lanewise.transfer.encoding import Encoding
from lanewise.transfer.faults import Faults, Frames
from lanewise.transfer.group_port import GroupPort
from lanewise.transfer.groups import SenderGroups
from lanewise.transfer.ipc_link import Device
from lanewise.transfer.letters import Letter
from lanewise.transfer.neighbour import MAX_RUNS, pack
from lanewise.transfer.outlet import Outlet
from lanewise.transfer.outlets import Outlets
from lanewise.transfer.records import Key, Limits, PageStore
from lanewise.transfer.send_window import Job
from lanewise.transfer.word_sum import packed
from lanewise.transfer.zmq_link import log

Bytes = NDArray[np.uint8]


@dataclass(slots=True)
class Load:
    """The bytes of a chunk: in pages as they lie, or gathered in one part."""

    key: Key
    parts: list[memoryview]
    num_bytes: int
    in_place: bool
    buffer: Bytes | None = None  # they were gathered in; it comes back when they have left
    runs: bytes = b""  # what goes instead of them: where they lie, for a partner that reads this process's memory
    crc: bytes = b""  # of words, where a GPU has computed it and there are no parts here


Way = Callable[[Frames, Load, float], bool]
"""Sends a chunk and sees to it that its buffer, where there is one, comes back; False: it did not go."""


class Ways:
    def __init__(self, store: PageStore, layout: KVLayout, limits: Limits, faults: Faults) -> None:
        self.groups: SenderGroups | None = None
        self.outlets: Outlets | None = None
        self.device: Device | None = None  # in whose memory the pool lies, and neighbours may read it
        self._store = store
        self._layout = layout
        self._encoding = Encoding.of(layout)
        self.refers = self._encoding is None  # of what is encoded nothing lies in pages
        self._limits = limits
        self._faults = faults
        self._buffers = Buffers(limits.data_hwm * limits.stripes)

    def use_groups(self, incarnation: str, host: str, on_broken: Callable[[str], None], device: str) -> GroupPort:
        self.groups = SenderGroups(incarnation, host, self._limits.chunk_bytes, on_broken, device)
        return self.groups.port

    def close(self) -> None:
        if self.groups:
            self.groups.port.close()
        if self.outlets:
            self.outlets.close()

    def forget(self, address: str) -> None:
        """Nothing uses this address any more."""
        if self.groups:
            self.groups.forget(address)
        if self.outlets:
            self.outlets.forget(address)

    def release(self, key: Key) -> None:
        """The transfer ends: its pages are read no more."""
        if self.outlets:
            self.outlets.release(key)

    def load(self, job: Job, *, in_place: bool, refer: bool) -> Load:
        """A chunk's bytes: in pages where they may be, as they are, and in few pieces; else gathered or encoded.

        `refer`: where they lie in such pages the partner is to be told so, unless that has failed before."""
        tokens, layers, heads = job.slice.ranges
        num_bytes = job.slice.wire_bytes(self._layout)
        refer = refer and not job.resend
        if refer and self.device and (load := self._on_device(self.device, job)):
            return load
        if (in_place or refer) and self._encoding is None:
            views = self._store.views(job.pages, tokens, layers, heads)
            if views and num_bytes >= len(views) * self._limits.least_piece_bytes:
                if refer and len(views) <= MAX_RUNS:
                    return Load(job.key, views, num_bytes, True, runs=pack(views))
                if in_place:
                    return Load(job.key, views, num_bytes, True)
        buffer = self._buffers.take(max(num_bytes, self._limits.chunk_bytes))
        payload = buffer[:num_bytes]
        if self._encoding is None:
            self._store.read(job.pages, tokens, layers, heads, payload)
        else:
            native = self._store.read(job.pages, tokens, layers, heads)
            self._encoding.encode(native.reshape(-1), len(tokens), len(layers), payload)
        return Load(job.key, [payload.data], num_bytes, False, buffer)

    def _on_device(self, device: Device, job: Job) -> Load | None:
        """Only where the bytes lie, and their checksum; None: they must go themselves."""
        try:
            areas = device.places(job.pages, *job.slice.ranges)
            if areas is None or len(areas) > MAX_RUNS:
                return None
            crc = packed(device.checksum(areas))
        except OSError as error:
            log.warning("KV by CUDA IPC: %s", error)
            return None
        return Load(job.key, [], job.slice.nbytes(self._layout), False, runs=neighbour.packed(areas), crc=crc)

    def by_outlet(self, outlet: Outlet, frames: Frames, load: Load, now: float) -> bool:
        header, *parts = frames
        num_bytes = sum(map(len, parts))
        head = direct.lengths(len(header), num_bytes) + header
        if self._faults.active:
            outlet.send(Letter(load.key, [head], len(head)), now)
            self._faults.point("mid_chunk")
            return outlet.send(Letter(load.key, parts, num_bytes), now)
        letter = Letter(load.key, [head, *parts], len(head) + num_bytes, load.in_place and bool(parts))
        if load.buffer is not None:
            letter.on_sent = partial(self._buffers.give_back, load.buffer)
        return outlet.send(letter, now, later=bool(load.runs))

    def commit(self, address: str, key: Key, header: bytes | memoryview, now: float) -> bool:
        """COMMIT behind the chunks that it is about; False: they do not go by a connection that keeps the order."""
        outlet = self.outlets.to(address) if self.outlets else None
        if outlet is None:
            return False
        head = direct.lengths(len(header), 0) + header
        at_once = self._faults.active  # a point that is reached says that it has left
        return outlet.send(Letter(key, [head], len(head)), now, later=not at_once)

    def by_socket(self, sock: zmq.Socket[bytes], frames: Frames, load: Load, _now: float) -> bool:
        try:
            sock.send(frames[0], MORE)
            self._faults.point("mid_chunk")
            tracker = sock.send(frames[1], NOBLOCK, copy=False, track=True)
        except zmq.Again:
            return False
        if load.buffer is not None:
            self._buffers.lend(load.buffer, tracker)
        return True

    def by_group(self, address: str, frames: Frames, load: Load, _now: float) -> bool:
        sent = self.groups is not None and self.groups.send(address, bytes(frames[0]), frames[1])
        if load.buffer is not None:
            self._buffers.give_back(load.buffer)
        return sent
