"""What this machine offers a local service: cores, GPUs, free ports.

Owns: reading /proc, cgroups and sockets for `lanewise up`.
Must not: decide how any of it is divided (plan.py does), import torch.
"""

from __future__ import annotations

import errno
import math
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lanewise.errors import ConfigError

FIRST_WORKER_PORT = 20_000


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts that the plan depends on."""

    cores: tuple[int, ...]  # those this process may run on
    usable_cores: int  # fewer than len(cores) under a cgroup CPU quota
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES spells them


def look() -> Machine:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = tuple(sorted(affinity(0))) if affinity else tuple(range(os.cpu_count() or 1))
    return Machine(cores, max(1, math.ceil(min(len(cores), _cpu_quota()))), _gpus())


def _cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs' worth of time this container gets; infinite where nothing limits it."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()[:2]
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def _gpus(devices: Path = Path("/dev")) -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name.strip() for name in visible.split(",")]
        # CUDA itself stops at the first invalid entry.
        stop = next((i for i, name in enumerate(named) if name in ("", "-1")), len(named))
        return tuple(named[:stop])
    numbers = (path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*"))
    return tuple(sorted((name for name in numbers if name.isdigit()), key=int))


def rss_bytes(pid: int) -> int:
    """Memory that a process holds right now; 0 where nobody can tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise ConfigError(f"expected an address such as 127.0.0.1:8000, got {address!r}")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(address: str) -> str:
    """The address a client on this machine uses for one that means all interfaces."""
    host, port = split_address(address)
    return join_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def port_problem(address: str) -> str | None:
    """Why nothing can listen at this address; None: something can."""
    host, port = split_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f"{host!r} is not an address of this machine ({error.strerror})"
    for family, kind, protocol, _, where in found[:1]:
        with socket.socket(family, kind, protocol) as probe:
            # Ends of finished connections must not count as users of the port; a listener still does.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(where)
                probe.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return f"port {port} of {host} is already in use"
                return f"cannot listen on {join_address(host, port)}: {error.strerror}"
    return None


def free_ports(host: str = "127.0.0.1", seed: int | None = None) -> Iterator[int]:
    """Free ports below the range the kernel hands to outgoing connections, each once.

    A worker comes back at the same port after a crash; in the kernel's range a stranger's outgoing connection could
    sit on it by then.
    """
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        low = 32_768
    first = FIRST_WORKER_PORT if low > FIRST_WORKER_PORT + 1000 else 1024
    candidates = list(range(first, max(low, first + 1)))
    random.Random(os.getpid() if seed is None else seed).shuffle(candidates)
    for port in candidates:
        if port_problem(join_address(host, port)) is None:
            yield port
    raise ConfigError(f"no free port between {first} and {low} on {host}")
