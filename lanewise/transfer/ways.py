"""How the bytes of a chunk leave a prefill worker: gathered from pages, then by a ZeroMQ socket or a process group.

Owns: the buffers in between. Page bytes are gathered once per sending, so pages are free the moment a transfer ends.
Must not: decide which chunk goes, or which way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import zmq
from numpy.typing import NDArray

from lanewise.policy.blocks import KVLayout
from lanewise.transfer.buffers import Buffers
from lanewise.transfer.encoding import Encoding
from lanewise.transfer.faults import Faults, Frames
from lanewise.transfer.group_port import GroupPort
from lanewise.transfer.groups import SenderGroups
from lanewise.transfer.records import Limits, PageStore
from lanewise.transfer.send_window import Job
from lanewise.transfer.zmq_link import MORE, NOBLOCK

Bytes = NDArray[np.uint8]
Way = Callable[[Frames, Bytes | None], bool]
"""Sends a chunk and sees to it that its buffer, where there is one, comes back; False: it did not go."""


class Ways:
    def __init__(self, store: PageStore, layout: KVLayout, limits: Limits, faults: Faults) -> None:
        self.groups: SenderGroups | None = None
        self._store = store
        self._layout = layout
        self._encoding = Encoding.of(layout)
        self._limits = limits
        self._faults = faults
        self._buffers = Buffers(limits.data_hwm * limits.stripes)

    def use_groups(self, incarnation: str, host: str, on_broken: Callable[[str], None]) -> GroupPort:
        self.groups = SenderGroups(incarnation, host, self._limits.chunk_bytes, on_broken)
        return self.groups.port

    def close(self) -> None:
        if self.groups:
            self.groups.port.close()

    def gather(self, job: Job) -> tuple[Bytes, Bytes]:
        """A buffer and the part of it that now holds the chunk."""
        tokens, layers = job.slice.tokens, job.slice.layers
        num_bytes = job.slice.wire_bytes(self._layout)
        buffer = self._buffers.take(max(num_bytes, self._limits.chunk_bytes))
        payload = buffer[:num_bytes]
        if self._encoding is None:
            self._store.read(job.pages, tokens, layers, payload)
        else:
            native = self._store.read(job.pages, tokens, layers)
            self._encoding.encode(native.reshape(-1), len(tokens), len(layers), payload)
        return buffer, payload

    def by_socket(self, sock: zmq.Socket[bytes], frames: Frames, buffer: Bytes | None) -> bool:
        try:
            sock.send(frames[0], MORE)
            self._faults.point("mid_chunk")
            tracker = sock.send(frames[1], NOBLOCK, copy=False, track=True)
        except zmq.Again:
            return False
        if buffer is not None:
            self._buffers.lend(buffer, tracker)
        return True

    def by_group(self, address: str, frames: Frames, buffer: Bytes | None) -> bool:
        sent = self.groups is not None and self.groups.send(address, bytes(frames[0]), frames[1])
        if buffer is not None:
            self._buffers.give_back(buffer)
        return sent
