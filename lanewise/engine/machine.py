"""The machine under a worker: its memory limit, its cores, its device.

Owns: reading cgroup and device limits, binding threads to cores, choosing a device by name.
Must not: allocate anything. `bind_cores` must run before torch computes, since threads inherit the binding.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lanewise.errors import ConfigError

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def choose_device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(f"device {asked!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {asked!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device {asked!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def bind_cores(cores: tuple[int, ...], threads: int) -> int:
    """Ties this thread, and those it starts, to `cores`; returns the number of compute threads set.

    Two workers whose thread pools share a core slow each other down a hundredfold, so a worker takes no more threads
    than it has cores.
    """
    allowed = os.sched_getaffinity(0)
    if cores:
        if missing := sorted(set(cores) - allowed):
            raise ConfigError(f"cores {missing} are not available to this process; it may use {sorted(allowed)}")
        os.sched_setaffinity(0, cores)
        allowed = set(cores)
    num_threads = threads or len(allowed)
    torch.set_num_threads(num_threads)
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError:  # torch has computed already, as in a test process; the pool then exists and stays unused
            return num_threads
    return num_threads


def memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or what this process' cgroup and machine allow, whichever is less."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    limits = []
    for name in CGROUP_LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return limits
