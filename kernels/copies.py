"""Copies between host and device that keep neither waiting for the other.

Owns: pinned memory for both directions, and the wait for what comes back. Must not: know what is copied.

A copy from or to ordinary memory makes the host wait for all that the device was given before it, and a step could not
be prepared while another runs. On a CPU nothing is copied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

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
