"""The memory of a GPU that a KV pool lies in, as processes of the same host may share it.

Owns: handles to it and to a block for tests, the stream on which the transfer thread's copies and checksums run, and
the wait for them. Must not: decide what is copied, or keep account of partners (`transfer/ipc_link.py` does).
**Not yet run on a GPU.** The tests run all but the stream: with a library in place of CUDA's driver, in Triton's
interpreter.

There is no wait for the model's steps, for the reason that `KVPool._own_ring` gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import structlog
import torch
from triton.errors import TritonError

from lanewise.kernels import triton_pieces
from lanewise.kernels.copies import Lane
from lanewise.kernels.cuda_ipc import Driver
from lanewise.kernels.triton_pieces import Areas

if TYPE_CHECKING:
    from lanewise.engine.kv_pool import KVPool

BLOCK_BYTES = 4 << 20

log = structlog.get_logger(__name__)


class DeviceMemory:
    """One thread at a time. Whatever the device or its driver refuses is an OSError; what is launched is over when a
    method returns."""

    def __init__(self, pool: KVPool, driver: Driver | None = None) -> None:
        """Raises OSError where this memory cannot be shared."""
        if pool.row_bytes % triton_pieces.WORD:
            raise OSError(f"the KV of a token is {pool.row_bytes} bytes: no whole words")
        self._pool = pool
        self._device = pool.device
        self._driver = driver or Driver(self._device.index or 0)
        self._block = _block(self._device)
        self._lane = Lane(self._device)
        self.block = self._block.data_ptr(), len(self._block)
        self.piece_bytes = pool.page_tokens * pool.row_bytes
        """Of the smallest piece of many that a chunk lies in."""
        self.exports = [(*area, *self._driver.export(area[0])) for area in (pool.area, self.block)]
        """(address, size, handle of the allocation it lies in, how far into it)."""

    def places(self, pages: Seq[int], tokens: range, layers: range, heads: range) -> Areas | None:
        """Where the pool keeps what these name, in the order of the wire; None where that is in too many pieces."""
        return self._pool.places(pages, tokens, layers, heads)

    def fill(self, data: bytes) -> None:
        """Into the block, from its start."""
        with self._own_lane():
            self._block[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def checksum(self, areas: Areas) -> int:
        """As `word_sum` would of the bytes."""
        with self._own_lane():
            return triton_pieces.checksum(areas, self._device)

    def copy(self, source: Areas, target: Areas) -> None:
        """`source` may lie in what was opened."""
        with self._own_lane():
            triton_pieces.copy(source, target, self._device)

    def wipe(self, areas: Areas) -> None:
        with self._own_lane():
            triton_pieces.zero(areas, self._device)

    def open(self, handle: bytes) -> tuple[int, int]:
        """Address and size of memory that another process exported."""
        return self._driver.open(handle)

    def close(self, address: int) -> None:
        self._driver.close(address)

    @contextlib.contextmanager
    def _own_lane(self) -> Iterator[None]:
        """On a stream beside that of the model's steps, and over at the end."""
        try:
            with self._lane.on():
                yield
        except (RuntimeError, TritonError) as error:  # what torch and Triton make of an error of the device
            raise OSError(f"GPU: {error}") from error


def _block(device: torch.device) -> torch.Tensor:
    return torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=device)


def share(pool: KVPool) -> DeviceMemory | None:
    """The pool's memory for processes of this host; None, and said why, where that cannot be."""
    try:
        memory = DeviceMemory(pool)
    except (OSError, RuntimeError) as error:
        log.warning("cuda_ipc_impossible", reason=str(error))
        return None
    log.warning(
        "cuda_ipc_untried",
        what="KV between processes of this host by CUDA IPC has never been run on a GPU by those who wrote it; every "
        "chunk is verified where it arrives, and goes by another way when it is not right",
    )
    return memory
