"""The KV pool: page bookkeeping plus the tensors the pages are in, and their canonical wire form.

Owns: allocation of the KV tensors, its automatic size, and the copies between pages and wire bytes.
Must not: compute attention (kernels do) or schedule. `read`, `write`, `views` and `places` are the only methods that
another thread than the engine's may call, and only for pages that the engine thread has lent to a transfer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np
import structlog
import torch

from lanewise.engine import populate
from lanewise.engine.model_config import ModelConfig
from lanewise.engine.pages import PageTable, PoolUsage
from lanewise.errors import ConfigError
from lanewise.kernels.copies import Lane, Ring, upload
from lanewise.kernels.native import ALIGNMENT, aligned
from lanewise.policy.blocks import UNIT_TOKENS, KVLayout

if TYPE_CHECKING:
    from lanewise.engine.device_memory import DeviceMemory

__all__ = ["KVPool", "PoolUsage", "layout_of", "pool_pages"]

log = structlog.get_logger(__name__)

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Areas = np.ndarray[tuple[int, int], np.dtype[np.uint64]]
"""Addresses and lengths, one row each."""


class Views(list[memoryview]):
    """Parts of memory in order; `areas` has the address and the length of each: asking every part would take longer
    than to copy it."""

    def __init__(self, parts: Iterable[memoryview], areas: Areas) -> None:
        super().__init__(parts)
        self.areas = areas


class KVPool(PageTable):
    """`layers[i]` is [2 (K, V), num_pages, page_tokens, kv_heads, head_dim]."""

    head_shards = 1  # all of it is in this process
    device_memory: DeviceMemory | None = None
    """Where processes of this host may have the KV from, of a pool in the memory of a GPU."""

    def __init__(self, layout: KVLayout, num_pages: int, page_tokens: int, device: torch.device) -> None:
        super().__init__(num_pages, page_tokens)
        self.layout = layout
        self.device = device
        shape = (2, num_pages, page_tokens, layout.num_kv_heads, layout.head_dim)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        memory = _zeros((layout.num_layers, *shape), dtype, device)
        self.layers = list(memory.unbind(0))
        self._heads = range(layout.num_kv_heads)
        self._head_bytes = layout.head_dim * layout.dtype_bytes
        self._raw = memory.view(layout.num_layers, 2, num_pages * page_tokens, -1).view(torch.uint8)
        self._rows: Bytes | None = self._raw.numpy() if device.type == "cpu" else None
        self._flat = self._rows.reshape(-1).data if self._rows is not None else None
        self._ring: Ring | None = None
        self.row_bytes = len(self._heads) * self._head_bytes
        self.area = memory.data_ptr(), self._raw.numel()
        """Address and size of the tensors."""

    def populate(self) -> threading.Thread | None:
        """Has memory that KV will be written to made real, in a thread of its own; None: not on a CPU."""
        if self.device.type != "cpu":
            return None
        return populate.in_background([half for layer in self.layers for half in layer])

    def read(self, pages: Seq[int], tokens: range, layers: range, heads: range, out: Bytes | None = None) -> Bytes:
        """Bytes [layer][K|V][token][head][dim] of these tokens of the sequence that `pages` belong to.

        Copied into `out`: uint8, contiguous, of exactly that size (ValueError); by default a new array."""
        within = self._within(heads)
        shape = (len(layers), 2, len(tokens), within.stop - within.start)
        if out is None:
            out = np.empty(math.prod(shape), dtype=np.uint8)
        block = out.reshape(shape)
        runs = self._runs(pages, tokens)
        if self._rows is not None:
            rows = self._rows[layers.start : layers.stop, :, :, within]
            for slot, offset, count in runs:
                block[:, :, offset : offset + count] = rows[:, :, slot : slot + count]
            return out
        ring = self._own_ring()
        with ring.lane.on():
            slots = self._slots(runs)
            parts = (self._raw[layer][:, :, within].index_select(1, slots) for layer in layers)
            ring.down(parts, out.reshape(-1))
        return out

    def write(
        self, pages: Seq[int], tokens: range, layers: range, heads: range, data: memoryview | bytes | Bytes
    ) -> None:
        """The inverse of `read`."""
        within = self._within(heads)
        source = np.frombuffer(data, dtype=np.uint8).reshape(len(layers), 2, len(tokens), within.stop - within.start)
        runs = self._runs(pages, tokens)
        if self._rows is not None:
            rows = self._rows[layers.start : layers.stop, :, :, within]
            for slot, offset, count in runs:
                rows[:, :, slot : slot + count] = source[:, :, offset : offset + count]
            return
        ring = self._own_ring()
        with ring.lane.on():
            slots = self._slots(runs)
            for index, layer in enumerate(layers):
                part = torch.empty(source.shape[1:], dtype=torch.uint8, device=self.device)
                ring.up(source[index].reshape(-1), part)
                self._raw[layer][:, :, within].index_copy_(1, slots, part)

    def views(self, pages: Seq[int], tokens: range, layers: range, heads: range) -> Views | None:
        """What `read` copies, in the same order, but where it lies: to be read or filled in place.

        None where it lies in no memory of this process, and of a part of the heads: a piece for each token of each
        layer would cost more than a copy."""
        if self._flat is None or heads != self._heads:
            return None
        flat, areas = self._flat, self._stretches(pages, tokens, layers)
        parts = [flat[start : start + length] for start, length in areas.tolist()]
        areas[:, 0] += np.uint64(self.area[0])
        return Views(parts, areas)

    def places(self, pages: Seq[int], tokens: range, layers: range, heads: range) -> Areas | None:
        """As `views`, but addresses and lengths in the memory of the device."""
        if heads != self._heads:
            return None
        areas = self._stretches(pages, tokens, layers)
        areas[:, 0] += np.uint64(self.area[0])
        return areas

    def share(self) -> None:
        """Lets processes of this host have the KV from the memory of the GPU, where it lies in one."""
        if self.device.type == "cuda" and self.head_shards == 1:
            try:
                from lanewise.engine import device_memory  # which needs Triton
            except ImportError as error:
                log.warning("cuda_ipc_impossible", reason=str(error))
            else:
                self.device_memory = device_memory.share(self)

    def _stretches(self, pages: Seq[int], tokens: range, layers: range) -> Areas:
        """Where the pieces start, counted from the start of the tensors, and how long they are; in the order of the
        wire, all heads."""
        row = self.row_bytes
        plane = self.num_pages * self.page_tokens * row  # K or V of one layer
        runs = np.array(self._runs(pages, tokens), np.uint64).reshape(-1, 3) * np.uint64(row)
        planes = np.arange(2 * layers.start, 2 * layers.stop, dtype=np.uint64) * np.uint64(plane)
        areas = np.empty((len(planes), len(runs), 2), np.uint64)
        areas[:, :, 0] = planes[:, None] + runs[:, 0]
        areas[:, :, 1] = runs[:, 2]
        return areas.reshape(-1, 2)

    def _within(self, heads: range) -> slice:
        """The bytes of these heads in the row of a token."""
        if heads.step != 1 or not 0 <= heads.start < heads.stop <= self._heads.stop:
            raise ValueError(f"{heads} does not lie in {len(self._heads)} heads")
        return slice(heads.start * self._head_bytes, heads.stop * self._head_bytes)

    def _own_ring(self) -> Ring:
        """By which KV passes between the host and this pool's device, off the stream of the model's steps.

        Off it without waiting: pages that a transfer has were given up by whoever computed with them after the results
        were taken, and are read again only when `write` has returned."""
        if self._ring is None:
            self._ring = Ring(Lane(self.device))
        return self._ring

    def _slots(self, runs: list[tuple[int, int, int]]) -> torch.Tensor:
        return upload(np.concatenate([np.arange(slot, slot + count) for slot, _, count in runs]), self.device)

    def _runs(self, pages: Seq[int], tokens: range) -> list[tuple[int, int, int]]:
        """(first slot, offset in `tokens`, count) of each stretch of tokens whose slots are neighbours."""
        if tokens.step != 1 or tokens.start < 0 or tokens.stop > len(pages) * self.page_tokens:
            raise ValueError(f"{tokens} does not lie in {len(pages)} pages of {self.page_tokens} tokens")
        runs: list[tuple[int, int, int]] = []
        token = tokens.start
        while token < tokens.stop:
            start = token
            page, offset = divmod(token, self.page_tokens)
            token = (page + 1) * self.page_tokens
            while token < tokens.stop and pages[page + 1] == pages[page] + 1:
                page += 1
                token += self.page_tokens
            first_page = pages[start // self.page_tokens]
            stop = min(token, tokens.stop)
            runs.append((first_page * self.page_tokens + offset, start - tokens.start, stop - start))
        return runs


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, since a NaN left in a masked slot would spread. On a CPU from calloc: memory is used as KV is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = aligned(np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8))[:num_bytes]
    return torch.from_numpy(memory).view(dtype).view(shape)


def layout_of(config: ModelConfig, dtype: torch.dtype) -> KVLayout:
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        dtype_bytes=dtype.itemsize,
    )


def pool_pages(
    layout: KVLayout,
    page_tokens: int,
    *,
    asked_bytes: int,
    memory_bytes: int,
    weight_bytes: int,
    workspace_bytes: int,
    sharing: int,
    useful_tokens: int,
) -> int:
    """Pages of the pool: `asked_bytes` if set, else a share of what memory leaves, but no more than can be used.

    `useful_tokens` is what all running sequences at full context would need.
    """
    page_bytes = page_tokens * layout.bytes_per_token
    if asked_bytes:
        num_bytes = asked_bytes
    else:
        left = int(memory_bytes * 0.8) - weight_bytes - workspace_bytes
        num_bytes = min(left // sharing, useful_tokens * layout.bytes_per_token)
    if num_bytes < UNIT_TOKENS * layout.bytes_per_token:
        raise ConfigError(
            f"{max(num_bytes, 0)} bytes are too few for a KV pool: {UNIT_TOKENS} tokens take "
            f"{UNIT_TOKENS * layout.bytes_per_token} (memory {memory_bytes}, weights {weight_bytes}, sharing {sharing})"
        )
    return num_bytes // page_bytes
