"""What a cluster takes from the machine and gives back: a veth pair with routes, and a cgroup in every hierarchy.

Owns: these, by the names of one slot. Must not: touch what carries another index.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.cluster.kube.slots import Slot

COMMAND_DEADLINE_S = 30
CGROUPS_GONE_DEADLINE_S = 20.0
CGROUP_ROOT = Path("/sys/fs/cgroup")
DAEMONS = "daemons"
WEIGHTS = {"cpu.shares": 3072, "cpu.weight": 300}
"""A cluster against the processes of the machine: as three of these, else one busy neighbour halves it. No more, since
the users of its services are such processes too, and decide nothing while they wait."""
AMONG_PODS = {"cpu.shares": 8192, "cpu.weight": 800}
"""The control plane against all pods (2048 on two cores). Without room of its own it waits behind workers that compute:
a call goes through four of its processes, and then takes seconds, while operators lose their leases."""


def command(*argv: str) -> str:
    """Runs a program of the machine; raises RuntimeError with what it said."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, env={**os.environ, "PATH": path}
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def connect(slot: Slot, pid: int) -> None:
    """A veth pair from here into the network of `pid`, with routes to its pods and Services; it goes with it."""
    inside = ("nsenter", "-t", str(pid), "-n")
    command("ip", "link", "add", slot.veth, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    command("ip", "addr", "add", f"{slot.host_ip}/24", "dev", slot.veth)
    command("ip", "link", "set", slot.veth, "up")
    command(*inside, "ip", "addr", "add", f"{slot.node_ip}/24", "dev", "eth0")
    command(*inside, "ip", "link", "set", "eth0", "up")
    command(*inside, "ip", "route", "add", "default", "via", slot.host_ip)
    for network in (slot.pod_cidr, slot.service_cidr):
        command("ip", "route", "replace", network, "via", slot.node_ip, "dev", slot.veth)


def disconnect(slot: Slot) -> None:
    """Removes the pair if it is still there: the kernel does so by itself a moment after the last process ended."""
    subprocess.run(["ip", "link", "del", slot.veth], capture_output=True, timeout=COMMAND_DEADLINE_S)


def hierarchies() -> list[Path]:
    """Roots of the cgroup hierarchies: one for version 2, one per controller for version 1."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return [CGROUP_ROOT]
    return [path for path in CGROUP_ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def make_cgroups(slot: Slot) -> None:
    """The kubelet wants its root to exist."""
    for hierarchy in hierarchies():
        controllers = hierarchy / "cgroup.controllers"
        if hierarchy == CGROUP_ROOT and controllers.exists():
            enabled = " ".join(f"+{name}" for name in controllers.read_text().split())
            (hierarchy / "cgroup.subtree_control").write_text(enabled)
        folder = hierarchy / slot.cgroup.strip("/")
        folder.mkdir(exist_ok=True)
        _weigh(folder, WEIGHTS)
        for name in ("cpuset.cpus", "cpuset.mems"):  # version 1: empty until copied from the parent
            if (folder / name).exists() and (hierarchy / name).exists():
                (folder / name).write_text((hierarchy / name).read_text())


def enroll(slot: Slot, pid: int) -> None:
    """Process `pid` and what it will start are the cluster's control plane: they share the cluster's processor time."""
    for hierarchy in hierarchies():
        cluster = hierarchy / slot.cgroup.strip("/")
        if not any((cluster / name).exists() for name in WEIGHTS):
            continue  # a hierarchy of version 1 that is about something else
        if (control := cluster / "cgroup.subtree_control").exists():
            control.write_text("+cpu")
        folder = cluster / DAEMONS
        folder.mkdir(exist_ok=True)
        _weigh(folder, AMONG_PODS)
        (folder / "cgroup.procs").write_text(str(pid))


def _weigh(folder: Path, weights: dict[str, int]) -> None:
    for name, weight in weights.items():
        if (folder / name).exists():
            (folder / name).write_text(str(weight))


def remove_cgroups(slot: Slot) -> None:
    """Removes the cgroups of a dead cluster; the kernel frees them shortly after their last process."""
    deadline = time.monotonic() + CGROUPS_GONE_DEADLINE_S
    while left := [path for path in cgroups(slot) if not _try_rmdir(path)]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"these cgroups still have processes: {', '.join(map(str, left[:5]))}")
        time.sleep(0.05)


def cgroups(slot: Slot) -> list[Path]:
    """Every cgroup of the cluster, children before parents."""
    found: list[Path] = []
    for hierarchy in hierarchies():
        for folder, _, _ in os.walk(hierarchy / slot.cgroup.strip("/"), topdown=False):
            found.append(Path(folder))
    return found


def _try_rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
