"""The service whose life is watched: what it is made of, its pods by role, and what it says when nobody disturbs it.

Owns: the resource, waiting for what was asked for, weights that say something else. Must not: disturb anything.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.fleet import HTTP_PORT
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import CommandFailed, TimedOut, wait_for
from tests.cluster.load import Stream
from tests.cluster.placed import placements
from tests.e2e.models import FABLE

SERVICE = "chat"
MODEL = "fable"
MODELS_MOUNT = "/models"
READY_DEADLINE_S = 120
STEP_DEADLINE_S = 120
LAST_LINES = 40


@dataclass
class Life:
    """The service under test and what its streams are measured against."""

    cluster: Cluster
    namespace: str
    expected: list[dict[str, str]] = field(default_factory=list)

    def address(self) -> str:
        """Of the Service, by its name, as any other pod would find it."""
        return f"{self.cluster.resolve(f'{SERVICE}-router.{self.namespace}.svc')}:{HTTP_PORT}"

    def pods(self, role: str, ready: bool = True) -> list[dict[str, Any]]:
        selector = f"lanewise.io/service={SERVICE},app.kubernetes.io/component={role}"
        return self.cluster.pods(self.namespace, selector, ready)

    def names(self, *roles: str) -> set[str]:
        return {pod["metadata"]["name"] for role in roles for pod in self.pods(role)}

    def carried(self, streams: Iterable[Stream]) -> dict[str, list[Stream]]:
        """Streams by the pods that they are on, as routers say."""
        by_id = {stream.request: stream for stream in streams}
        routers = {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in self.pods("router")}
        found: dict[str, list[Stream]] = {}
        for request, placement in placements(routers, by_id).items():
            for pod in placement.pods:
                found.setdefault(pod, []).append(by_id[request])
        return found

    def uids(self, role: str) -> set[str]:
        return {pod["metadata"]["uid"] for pod in self.pods(role)}

    def all_uids(self) -> set[str]:
        return self.uids("router") | self.uids("prefill") | self.uids("decode")

    def patch(self, spec: dict[str, Any]) -> None:
        """A user's edit of the resource."""
        body = json.dumps({"spec": spec})
        self.cluster.kubectl("patch", "llmservice", SERVICE, "-n", self.namespace, "--type=merge", "-p", body)

    def wait_ready(self) -> None:
        """Until the operator says so of what is asked for now."""

        def ready() -> bool:
            service = self.cluster.get("llmservice", SERVICE, self.namespace)
            seen = service.get("status", {}).get("observedGeneration")
            return bool(seen == service["metadata"]["generation"] and condition(service, "Ready") == "True")

        wait_for(ready, f"{SERVICE} to be Ready", READY_DEADLINE_S, poll_s=0.3)

    def wait_pods(self, role: str, count: int, without: set[str] | None = None) -> None:
        """Until exactly `count` pods of a role are left, all ready, none of them in `without`."""

        def settled() -> bool:
            found = {pod["metadata"]["uid"] for pod in self.pods(role, ready=False)}
            return found == self.uids(role) and len(found) == count and not found & (without or set())

        try:
            wait_for(settled, f"{count} new {role} pods", STEP_DEADLINE_S, poll_s=0.3)
        except TimedOut as error:
            raise TimedOut(f"{error}\n{self.found(role)}") from None

    def found(self, role: str) -> str:
        """The pods of a role, and the last that those said which are not ready or on their way out."""
        lines = []
        for pod in self.pods(role, ready=False):
            meta = pod["metadata"]
            leaving, ready = meta.get("deletionTimestamp", ""), condition(pod, "Ready")
            lines.append(f"{meta['name']} {pod['status'].get('phase')}, Ready {ready}, deleted {leaving or 'not'}")
            if leaving or ready != "True":
                with contextlib.suppress(CommandFailed):  # it has gone meanwhile
                    lines.append(self.cluster.logs(meta["name"], self.namespace, f"--tail={LAST_LINES}"))
        return "\n".join(lines)

    def is_altered(self, stream: Stream) -> bool:
        return not any(known[stream.prompt] == stream.text for known in self.expected)


def spec(cluster: Cluster, weights: Path) -> dict[str, Any]:
    """One thread per worker, as little CPU asked for as is possible, and drains that a test can wait for."""
    template: Any = cluster.worker_pod_template()
    template["spec"]["volumes"].append({"name": "weights", "hostPath": {"path": str(weights), "type": "Directory"}})
    mount = {"name": "weights", "mountPath": f"{MODELS_MOUNT}/other", "readOnly": True}
    template["spec"]["containers"][0]["volumeMounts"].append(mount)
    no_gpu = {"nvidia.com/gpu": "0"}  # which a model that is not built in would get
    template["spec"]["containers"][0]["resources"] = {"limits": no_gpu, "requests": no_gpu}
    worker = {"resources": {"requests": {"cpu": "50m"}}, "podTemplate": template}
    return {
        # Equal text is promised in float32 only, and a model from a folder is computed as it is stored.
        "model": {"uri": f"builtin://{MODEL}", "servedName": MODEL, "dtype": "float32"},
        "disaggregation": "Always",
        "drain": {"timeout": "0s", "max": "2m"},
        "prefill": {**worker, "replicas": 1},
        "decode": {**worker, "replicas": 1},
        "router": {"replicas": 2, "resources": {"requests": {"cpu": "50m"}}},
    }


def other_weights(folder: Path) -> Path:
    """The built-in model with weights that make it say something else."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(FABLE, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "mlp.down_proj" in name)
    torch.manual_seed(0)
    tensors[name] = tensors[name] + 0.05 * torch.randn_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def say(text: str) -> None:
    """Into the log of the run, whatever pytest captures."""
    print(text, file=sys.__stderr__, flush=True)
