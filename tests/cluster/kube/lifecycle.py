"""Starts and ends a cluster.

Owns: the order of things and their deadlines; what is on the machine because of a cluster is gone when `stop` returns.
Must not: offer anything to tests (see cluster.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.cluster.kube import contents, daemons, gobuild, machine, pki, slots
from tests.cluster.kube.components import CORE
from tests.cluster.kube.slots import Claim, Slot
from tests.cluster.kube.tools import kubectl, wait_for

START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 20.0
READY_DEADLINE = "60s"
IMPORT_DEADLINE_S = 180
REQUEST_DEADLINE_S = 5.0
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child")

T = TypeVar("T")


class ClusterError(RuntimeError):
    """A cluster did not come up, or did not go away."""


@dataclass
class Running:
    """A living cluster; `claim` and `process` are None when another process started it."""

    slot: Slot
    pid: int
    claim: Claim | None = None
    process: subprocess.Popen[bytes] | None = None

    def request(self, **request: object) -> dict[str, dict[str, int]]:
        """Asks the supervisor; see there for the requests. Raises ClusterError with its answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(REQUEST_DEADLINE_S)
            connection.connect(str(self.slot.control))
            with connection.makefile("rw") as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                answer: dict[str, dict[str, int]] = json.loads(stream.readline())
        if "error" in answer:
            raise ClusterError(str(answer["error"]))
        return answer

    def start(self, argv: Sequence[str], name: str = "") -> None:
        self.request(op="start", name=name or Path(argv[0]).name, argv=list(argv))


def start(detached: bool = False) -> Running:
    """A new cluster whose node is Ready. It ends with this process unless it is `detached`. Raises ClusterError."""
    claim = slots.claim()
    try:
        _clean(claim.slot)
        running = _boot(claim, detached)
    except BaseException:
        _clean(claim.slot)
        claim.release()
        raise
    try:
        with ThreadPoolExecutor(1) as pool:
            images = pool.submit(contents.build, running.slot.root / "images")
            _control_plane(running)
            _node(running, images.result())
    except BaseException:
        log = _logs(running.slot)
        stop(running)
        print(log, file=sys.stderr)
        raise
    return running


def stop(running: Running) -> None:
    """Ends the cluster and removes every trace of it."""
    slot, process = running.slot, running.process
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGKILL)  # process 1 of a namespace takes everything in it along
    if process is not None:
        with process:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(STOP_DEADLINE_S)
    claim = running.claim or wait_for(lambda: slots.try_claim(slot), f"cluster {slot.index} to end", STOP_DEADLINE_S)
    _clean(slot)
    claim.release()


def attach(slot: Slot) -> Running | None:
    """The living cluster of a slot that another process started, or None."""
    try:
        pid = _peer(slot)
    except OSError:
        return None
    return Running(slot, pid)


def left_running() -> list[Slot]:
    """Clusters that were started detached, and what a killed test run left behind; never one that a process owns."""
    found = []
    for slot in slots.taken():
        claim = slots.try_claim(slot)
        if claim is not None:
            claim.release()
        if claim is not None or (slot.root / "detached").exists():
            found.append(slot)
    return found


def down(slot: Slot) -> None:
    """Ends a cluster of `left_running`."""
    running = attach(slot)
    if running is not None:
        stop(running)
        return
    claim = slots.try_claim(slot)
    if claim is None:
        raise ClusterError(f"cluster {slot.index} is starting or ending: try again")
    _clean(slot)
    claim.release()


def _clean(slot: Slot) -> None:
    machine.disconnect(slot)
    machine.remove_cgroups(slot)
    shutil.rmtree(slot.root, ignore_errors=True)
    if slot.root.exists():
        raise ClusterError(f"{slot.root} could not be removed")


def _boot(claim: Claim, detached: bool) -> Running:
    """The namespaces with their supervisor, connected to the machine's network; no daemon yet."""
    slot = claim.slot
    slot.root.mkdir(parents=True, mode=0o711)
    pki.make(slot)
    daemons.write_files(slot, cni=_cni())
    machine.make_cgroups(slot)
    if detached:
        (slot.root / "detached").touch()
    path = [str(folder) for folder in gobuild.bin_dirs()] + [os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
    supervisor = str(Path(__file__).with_name("supervisor.py"))
    mode = "detached" if detached else "owned"
    with (slot.root / "log" / "supervisor.log").open("wb") as log:
        process = subprocess.Popen(
            [*UNSHARE, sys.executable, "-I", supervisor, str(slot.root), str(claim.fd), mode],
            stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "PATH": ":".join(path)},
            pass_fds=(claim.fd,),
            start_new_session=True,
        )
    running = Running(slot, 0, claim, process)
    running.pid = _wait(lambda: _peer_or_none(slot), "the supervisor", START_DEADLINE_S, process)
    machine.enroll(slot, running.pid)
    machine.connect(slot, running.pid)
    return running


def _cni() -> Path:
    (part,) = (part for part in CORE if part.name == "cni")
    return gobuild.cache_root() / part.relative_dir


def _peer(slot: Slot) -> int:
    """Process id of the supervisor as seen from here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(REQUEST_DEADLINE_S)
        connection.connect(str(slot.control))
        pid = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4]
    return int.from_bytes(pid, sys.byteorder)


def _peer_or_none(slot: Slot) -> int | None:
    try:
        return _peer(slot)
    except OSError:
        return None


def _control_plane(running: Running) -> None:
    slot = running.slot
    running.start(daemons.etcd(slot))
    running.start(daemons.apiserver(slot))
    running.start(["containerd", "--config", f"{slot.root}/containerd.toml"])
    _wait(lambda: _ready(slot), "the API server", START_DEADLINE_S, running.process)
    running.start(daemons.controller_manager(slot))
    running.start(daemons.scheduler(slot))
    running.start(daemons.proxy_command(slot))
    running.start(["coredns", "-conf", f"{slot.root}/Corefile"])


def _node(running: Running, images: Path) -> None:
    slot = running.slot
    _import(running, images)
    running.start(daemons.kubelet_command(slot))
    node = f"node/{slot.node}"
    services = json.dumps({"apiVersion": "v1", "kind": "List", "items": daemons.dns_service(slot)})
    kubectl(slot.kubeconfig, "create", "-f", "-", stdin=services)
    for condition, target in (("create", "serviceaccount/default"), ("create", node), ("condition=Ready", node)):
        kubectl(slot.kubeconfig, "wait", f"--for={condition}", target, f"--timeout={READY_DEADLINE}")


def load_images(running: Running) -> None:
    """Gives the node images of the working tree as it is now; pods that run keep what they have."""
    _import(running, contents.build(running.slot.root / "images"))


def _import(running: Running, archive: Path) -> None:
    """Puts the images into the node's container runtime, from inside its namespaces."""
    inside = ["nsenter", "-t", str(running.pid), "-m", "-n", "-p"]
    path = ":".join(str(folder) for folder in gobuild.bin_dirs()) + ":" + os.environ.get("PATH", "")
    command = [*inside, "ctr", "-n", "k8s.io", "images", "import", str(archive)]

    def run() -> bool:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_DEADLINE_S, env={**os.environ, "PATH": path}
        )
        with (running.slot.root / "log" / "import.log").open("a") as log:
            log.write(done.stdout + done.stderr)
        return done.returncode == 0

    _wait(run, "the images", IMPORT_DEADLINE_S, running.process)
    shutil.rmtree(archive.parent)


def _ready(slot: Slot) -> bool:
    return kubectl(slot.kubeconfig, "get", "--raw", "/readyz") == "ok"


def _wait(probe: Callable[[], T | None], what: str, deadline_s: float, process: subprocess.Popen[bytes] | None) -> T:
    """Like wait_for, but gives up when the cluster's first process has ended."""

    def checked() -> T | None:
        if process is not None and process.poll() is not None:
            raise ClusterError(f"the supervisor ended with {process.returncode} while waiting for {what}")
        return probe()

    return wait_for(checked, what, deadline_s)


def _logs(slot: Slot, lines: int = 15) -> str:
    """The end of every log, for the person who has to find out why a cluster did not start."""
    parts = []
    for path in sorted((slot.root / "log").glob("*.log")):
        if path != slot.audit_log:
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            parts.append(f"--- {path.name}\n{tail}")
    return "\n".join(parts)
