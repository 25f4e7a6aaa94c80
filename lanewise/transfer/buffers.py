"""Memory that gathered chunks are sent from, used again as soon as the network has let go of it.

Fresh memory costs a page fault per 4 KiB, more than the gather itself. Must not: know chunks or sockets.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import zmq
from numpy.typing import NDArray


class Buffers:
    def __init__(self, most: int) -> None:
        """`most`: buffers kept for later; as many as there can be in the network's queues."""
        self._most = most
        self._free: list[NDArray[np.uint8]] = []
        self._lent: deque[tuple[zmq.MessageTracker, NDArray[np.uint8]]] = deque()

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """A buffer of at least this size; the one that came back last, which may still be in a cache."""
        while self._lent and self._lent[0][0].done:
            self.give_back(self._lent.popleft()[1])
        if len(self._lent) > self._most:
            self._look_behind()
        if self._free and self._free[-1].nbytes >= num_bytes:
            return self._free.pop()
        self._free.clear()  # all are of the size of chunks so far
        return np.empty(num_bytes, np.uint8)

    def lend(self, buffer: NDArray[np.uint8], tracker: zmq.MessageTracker) -> None:
        """The network reads from the buffer until the tracker is done."""
        self._lent.append((tracker, buffer))

    def _look_behind(self) -> None:
        """Buffers come back in order on one connection; one that is stuck must not hold those of the others."""
        done = [buffer for tracker, buffer in self._lent if tracker.done]
        self._lent = deque(each for each in self._lent if not each[0].done)
        for buffer in done:
            self.give_back(buffer)

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        """Nobody reads from it any more."""
        if len(self._free) < self._most:
            self._free.append(buffer)
