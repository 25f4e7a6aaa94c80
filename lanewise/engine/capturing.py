"""Capturing device work as CUDA graphs, within what that may take.

Owns: the budget, the memory pool that all graphs of a decoder share, how one is captured.
Must not: know what is computed. **Not yet run on a GPU.**
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

WARM_RUNS = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Budget:
    """What capturing may take: wall time, and device memory beside weights and KV."""

    seconds: float
    num_bytes: int


class Recorder:
    """Captures one thing after the other; ask `spent` before each. Large things first, since smaller ones then fit
    into their memory."""

    def __init__(self, budget: Budget, device: torch.device) -> None:
        self._budget = budget
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._started, self._before = time.monotonic(), torch.cuda.memory_reserved(device)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def num_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) - self._before

    @property
    def spent(self) -> bool:
        return self.seconds > self._budget.seconds or self.num_bytes > self._budget.num_bytes

    def record(self, compute: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of `compute`, replayed once, and what it returns: tensors that each replay writes again."""
        for _ in range(WARM_RUNS):  # compiles kernels, chooses products
            compute()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = compute()
        graph.replay()  # the first is slower
        return graph, result
