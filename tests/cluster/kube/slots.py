"""Where a cluster lives: every name, address, folder and cgroup of it follows from one small index.

Owns: the claim of an index, by a file lock that the cluster's first process keeps as long as it lives.
Must not: start anything.
Two clusters with different indices share nothing, so taking one down cannot touch the other.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

NUM_SLOTS = 16


class NoSlot(RuntimeError):
    """Every index is taken by a living cluster."""


def state_root() -> Path:
    """LANEWISE_KUBE_STATE, else /var/tmp/lanewise-kube; no overlay file system, since images are mounted from it."""
    return Path(os.environ.get("LANEWISE_KUBE_STATE") or "/var/tmp/lanewise-kube")


@dataclass(frozen=True)
class Slot:
    """The names of the cluster with this index."""

    index: int

    @property
    def root(self) -> Path:
        return state_root() / str(self.index)

    @property
    def lock(self) -> Path:
        return state_root() / f"{self.index}.lock"

    @property
    def node(self) -> str:
        return f"node{self.index}"

    @property
    def cgroup(self) -> str:
        return f"/lanewise-{self.index}"

    @property
    def veth(self) -> str:
        return f"lanewise{self.index}"

    @property
    def host_ip(self) -> str:
        return f"10.250.{self.index}.1"

    @property
    def node_ip(self) -> str:
        return f"10.250.{self.index}.2"

    @property
    def pod_cidr(self) -> str:
        return f"10.244.{self.index}.0/24"

    @property
    def fake_pod_cidr(self) -> str:
        """Addresses of pods that only kwok pretends to run; no packet ever goes there."""
        return f"10.245.{16 * self.index}.0/20"

    @property
    def service_cidr(self) -> str:
        return f"10.96.{16 * self.index}.0/20"

    @property
    def api_ip(self) -> str:
        return f"10.96.{16 * self.index}.1"

    @property
    def dns_ip(self) -> str:
        return f"10.96.{16 * self.index}.10"

    @property
    def kubeconfig(self) -> Path:
        return self.root / "pki" / "admin.kubeconfig"

    @property
    def control(self) -> Path:
        """Socket of the supervisor."""
        return self.root / "control.sock"

    @property
    def audit_log(self) -> Path:
        return self.root / "log" / "audit.log"


@dataclass(frozen=True)
class Claim:
    """An index that is ours; `fd` holds the lock, and so does every process that inherits it."""

    slot: Slot
    fd: int

    def release(self) -> None:
        """Frees the index. The file goes while it is locked, see `try_claim`."""
        self.slot.lock.unlink(missing_ok=True)
        os.close(self.fd)


def try_claim(slot: Slot) -> Claim | None:
    """The claim of an index, or None when a living cluster has it."""
    state_root().mkdir(parents=True, exist_ok=True)
    fd = os.open(slot.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.fstat(fd).st_ino == slot.lock.stat().st_ino  # else its last owner removed the file under us
    except (BlockingIOError, FileNotFoundError):
        same = False
    if not same:
        os.close(fd)
        return None
    return Claim(slot, fd)


def claim() -> Claim:
    """The first free index. Raises NoSlot."""
    for index in range(NUM_SLOTS):
        claimed = try_claim(Slot(index))
        if claimed is not None:
            return claimed
    raise NoSlot(f"all {NUM_SLOTS} cluster indices are taken: `make cluster-down` ends one that was left running")


def taken() -> list[Slot]:
    """Indices that have a state folder, living or left behind."""
    slots = (Slot(index) for index in range(NUM_SLOTS))
    return [slot for slot in slots if slot.root.exists()]
