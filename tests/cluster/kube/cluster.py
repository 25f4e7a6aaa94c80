"""A Kubernetes as tests see it: kubectl, helm, objects, the audit log, and the means to disturb it.

Owns: the handle. Must not: start or end clusters (see lifecycle.py).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.kube import contents, dns, machine
from tests.cluster.kube.audit import AuditLog
from tests.cluster.kube.lifecycle import Running
from tests.cluster.kube.reader import Reader
from tests.cluster.kube.slots import Slot
from tests.cluster.kube.tools import COMMAND_DEADLINE_S, CommandFailed, call, wait_for

Manifest = Mapping[str, Any]


class NotOurs(RuntimeError):
    """The cluster was given by --kubeconfig: its machine is out of reach."""


@dataclass(frozen=True)
class Images:
    """Names of the images that the node has."""

    control: str = contents.CONTROL_IMAGE
    worker: str = contents.WORKER_IMAGE
    app: str = contents.APP_IMAGE


class Cluster:
    """`running` is None for a cluster that was given by its kubeconfig."""

    def __init__(self, kubeconfig: Path, running: Running | None, images: Images | None = None) -> None:
        self.kubeconfig = kubeconfig
        self._running = running
        self.images = images or Images()
        # Only kubectl knows every way there is to sign in to a cluster of somebody else.
        self._reader = Reader(kubeconfig) if running is not None else None

    # ------------------------------------------------------------ objects

    def kubectl(self, *args: str, stdin: str = "", deadline_s: float = COMMAND_DEADLINE_S) -> str:
        """Standard output; raises CommandFailed with what kubectl said."""
        return call("kubectl", self.kubeconfig, *args, stdin=stdin, deadline_s=deadline_s)

    def helm(self, *args: str, stdin: str = "", deadline_s: float = 120.0) -> str:
        return call("helm", self.kubeconfig, *args, stdin=stdin, deadline_s=deadline_s)

    def apply(self, *manifests: Manifest | str, namespace: str = "", manager: str = "test") -> None:
        """Server-side apply of objects or YAML texts, in one call, with strict field validation."""
        texts = [text if isinstance(text, str) else json.dumps(text) for text in manifests]
        command = ["apply", "--server-side", f"--field-manager={manager}", "--validate=strict", "-f", "-"]
        self.kubectl(*command, *_in(namespace), stdin="\n---\n".join(texts))

    def get(self, kind: str, name: str, namespace: str = "") -> dict[str, Any]:
        """One object; raises CommandFailed when there is none."""
        if self._reader is not None:
            return self._reader.get(kind, name, namespace)
        found: dict[str, Any] = json.loads(self.kubectl("get", kind, name, *_in(namespace), "-o", "json"))
        return found

    def find(self, kind: str, name: str, namespace: str = "") -> dict[str, Any] | None:
        """One object, or None."""
        try:
            return self.get(kind, name, namespace)
        except CommandFailed as error:
            if "NotFound" in str(error):
                return None
            raise

    def items(self, kind: str, namespace: str = "", selector: str = "") -> list[dict[str, Any]]:
        """All objects of a kind in a namespace (all namespaces when empty) with these labels."""
        if self._reader is not None:
            return self._reader.items(kind, namespace, selector)
        where = _in(namespace) if namespace else ["--all-namespaces"]
        chosen = ["-l", selector] if selector else []
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, *where, *chosen, "-o", "json"))["items"]
        return found

    def pods(self, namespace: str, selector: str = "", ready: bool = False) -> list[dict[str, Any]]:
        """Pods that are not being deleted; with `ready` only those."""
        living = (
            pod for pod in self.items("pods", namespace, selector) if not pod["metadata"].get("deletionTimestamp")
        )
        return [pod for pod in living if not ready or condition(pod, "Ready") == "True"]

    def delete(self, kind: str, name: str, namespace: str = "", *args: str) -> None:
        self.kubectl("delete", kind, name, *_in(namespace), *args)

    def logs(self, pod: str, namespace: str, *args: str) -> str:
        return self.kubectl("logs", pod, *_in(namespace), *args)

    # ------------------------------------------------------------ reach

    @property
    def slot(self) -> Slot:
        """Names and addresses; raises NotOurs for a foreign cluster."""
        return self._ours().slot

    @property
    def audit(self) -> AuditLog:
        return AuditLog(self.slot.audit_log)

    @property
    def node(self) -> str:
        return self.slot.node

    @property
    def node_ip(self) -> str:
        return self.slot.node_ip

    def resolve(self, host: str) -> str:
        """Address of NAME.NAMESPACE.svc, asked from the cluster's DNS; from here it is reached as from a pod."""
        found = dns.resolve(f"{host}.cluster.local", self.slot.dns_ip)
        assert found, f"the cluster's DNS knows no {host}"
        return found[0]

    def worker_pod_template(self) -> dict[str, object]:
        """What a worker role's `podTemplate` must be here: torch by hostPath, since it is too big for an image."""
        return contents.worker_pod_template()

    # ------------------------------------------------------------ disturbance

    def start(self, argv: list[str], name: str = "") -> None:
        """One more supervised program beside the node's own, in its namespaces; it lives until `stop`, or the end."""
        self._ours().start(argv, name)

    def stop(self, name: str) -> None:
        """Ends a program of `start`: SIGTERM, and nobody starts it again."""
        self._ours().request(op="stop", name=name)

    def restart(self, daemon: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Kills a daemon of the node, which the supervisor starts again."""
        before = self._ours().request(op="signal", name=daemon, signal=int(number))[daemon]["starts"]
        wait_for(lambda: self._ours().request(op="status")[daemon]["starts"] > before, f"{daemon} to restart", 30)

    def restart_apiserver(self) -> None:
        """Kills the API server and returns when its successor is ready."""
        self.restart("kube-apiserver")
        wait_for(lambda: self.kubectl("get", "--raw", "/readyz") == "ok", "the API server", 60)

    def processes(self, pod: str, namespace: str) -> list[int]:
        """Process ids, as seen from here, of all containers of a pod (the sandbox's is among them)."""
        uid = self.get("pod", pod, namespace)["metadata"]["uid"]
        found: set[int] = set()
        for folder in machine.cgroups(self.slot):
            if f"pod{uid}" in str(folder):
                found |= {int(pid) for pid in (folder / "cgroup.procs").read_text().split()}
        return sorted(found)

    def signal_pod(self, pod: str, namespace: str, number: signal.Signals) -> None:
        """Sends a signal to every process of a pod but its sandbox."""
        for pid in self.processes(pod, namespace):
            if Path(f"/proc/{pid}/comm").read_text().strip() != "pause":
                os.kill(pid, number)

    def _ours(self) -> Running:
        if self._running is None:
            raise NotOurs("this needs the harness's own cluster, not one given by --kubeconfig")
        return self._running


def condition(thing: Manifest, kind: str) -> str:
    """Status of a condition: True, False, Unknown, or empty when it is not there."""
    found: Iterable[Manifest] = thing.get("status", {}).get("conditions", ())
    return next((str(part["status"]) for part in found if part["type"] == kind), "")


def _in(namespace: str) -> list[str]:
    return ["-n", namespace] if namespace else []
