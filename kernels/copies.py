"""Copies between host and device that keep neither waiting for the other.

Owns: pinned memory for both directions, the wait for what comes back, and a stream beside that of the model's steps.
Must not: know what is copied.

A copy from or to ordinary memory makes the host wait for all that the device was given before it, and a step could not
be prepared while another runs. On a CPU nothing is copied.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

LIMIT_S = 300.0  # no step takes as long: a device that is silent for so long does not come back
POLL_S = 20e-6  # the device has its next step by then, so that it waits for nobody meanwhile


def staged(values: np.ndarray | Sequence[int], device: torch.device) -> torch.Tensor:
    """`values` (integers become int64) in host memory from which `copy_(..., non_blocking=True)` to `device` does not
    wait. torch keeps that memory until the copy is over."""
    host = torch.from_numpy(values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64))
    return host if device.type == "cpu" else host.pin_memory()


def upload(values: np.ndarray | Sequence[int], device: torch.device) -> torch.Tensor:
    """`values` on the device, for what is computed there next."""
    return staged(values, device).to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host."""

    def __init__(self, *parts: torch.Tensor) -> None:
        self._event: Any = None  # a torch.cuda.Event, where there is something to wait for
        self._parts = parts
        if parts and parts[0].device.type != "cpu":
            self._parts = tuple(torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts)
            for here, there in zip(self._parts, parts, strict=True):
                here.copy_(there, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(parts[0].device))

    @property
    def done(self) -> bool:
        """Whether `wait` would not wait; on a CPU always."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors in host memory. RuntimeError when the device says nothing for LIMIT_S."""
        if self._event is not None:
            deadline = time.monotonic() + LIMIT_S
            while not self._event.query():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the device has not ended a step within {LIMIT_S:g} s")
                time.sleep(POLL_S)  # which lets the other threads have the interpreter
            self._event = None
        return self._parts


class Lane:
    """A stream of a device beside the one the model's steps run on, for one thread at a time: neither waits for the
    other. So what is copied there must be nobody else's meanwhile. On a CPU, where nothing runs beside the host, just
    calls in order. **Not yet run on a GPU.**"""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)  # what there is so far may be used at once

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """What is launched inside runs on this lane, and is over at the end."""
        with self._lock, torch.inference_mode():
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                try:
                    yield
                finally:
                    self._stream.synchronize()  # lets the other threads have the interpreter

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """A point that `wait` waits for: all that was launched before it is over."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()


class Ring:
    """Pinned memory in pieces that take turns, through which bytes pass between host and device while others are on
    their way. To be used inside `lane.on()`."""

    def __init__(self, lane: Lane, slots: int = 8, slot_bytes: int = 1 << 20) -> None:
        self.lane = lane
        pinned = lane.device.type == "cuda"
        self._slots = [torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(slots)]
        self._slot_bytes = slot_bytes
        self._next = 0
        self._marks: list[Any] = [None] * slots  # until then the device uses a slot

    def down(self, parts: Iterable[torch.Tensor], out: NDArray[np.uint8]) -> None:
        """All bytes of the parts, contiguous and each made when its turn comes, into `out`: flat, of that size."""
        waiting: deque[tuple[int, int, int]] = deque()
        at = 0
        for part in parts:
            flat = part.reshape(-1).view(torch.uint8)
            for start in range(0, len(flat), self._slot_bytes):
                piece = flat[start : start + self._slot_bytes]
                if len(waiting) == len(self._slots):
                    self._take(*waiting.popleft(), out)
                slot, size = self._turn(), piece.numel()
                self.lane.copy(self._slots[slot][:size], piece)
                self._marks[slot] = self.lane.mark()
                waiting.append((slot, at, size))
                at += size
        while waiting:
            self._take(*waiting.popleft(), out)

    def up(self, source: NDArray[np.uint8], target: torch.Tensor) -> None:
        """Flat bytes to a contiguous tensor of the device that has as many; there when the lane has got so far."""
        flat = target.reshape(-1).view(torch.uint8)
        for start in range(0, len(source), self._slot_bytes):
            slot, piece = self._turn(), source[start : start + self._slot_bytes]
            self.lane.wait(self._marks[slot])
            self._slots[slot][: len(piece)].numpy()[:] = piece
            self.lane.copy(flat[start : start + len(piece)], self._slots[slot][: len(piece)])
            self._marks[slot] = self.lane.mark()

    def _turn(self) -> int:
        slot, self._next = self._next, (self._next + 1) % len(self._slots)
        return slot

    def _take(self, slot: int, at: int, size: int, out: NDArray[np.uint8]) -> None:
        self.lane.wait(self._marks[slot])
        out[at : at + size] = self._slots[slot][:size].numpy()
