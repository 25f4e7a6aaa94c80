"""Memory and processor time of a pod's processes, from the kernel.

Owns: the measurement. Must not: know what a sensible value is.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.kube.cluster import Cluster

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """`cores` is the mean since the measurement before."""

    pids: tuple[int, ...]
    at: float
    cpu_s: float
    memory_bytes: int
    cores: float = 0.0

    @classmethod
    def of(cls, cluster: Cluster, pod: str, namespace: str) -> Usage:
        return cls._read(tuple(cluster.processes(pod, namespace)))

    def after(self, seconds: float) -> Usage:
        """The same processes after a while; the wait is the measurement."""
        time.sleep(seconds)
        now = self._read(self.pids)
        cores = (now.cpu_s - self.cpu_s) / (now.at - self.at)
        return Usage(now.pids, now.at, now.cpu_s, now.memory_bytes, cores)

    @classmethod
    def _read(cls, pids: tuple[int, ...]) -> Usage:
        cpu, memory = 0.0, 0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / TICKS_PER_S
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            memory += next(int(line.split()[1]) for line in rollup if line.startswith("Rss:")) * 1024
        return cls(pids, time.monotonic(), cpu, memory)
