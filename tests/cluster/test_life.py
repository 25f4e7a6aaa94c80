"""From `helm install` to streams, and what happens to 16 of them when everything around them changes.

Every step of `test_streams_survive_what_happens_around_them` hits a pod while streams are past their first token. None
may fail, and none may say anything else than the undisturbed service says; the printed table is the record.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fleet import HELD, HTTP_PORT, RESUMED, TRANSFERS, Counters, scrape
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for
from tests.cluster.load import Load, Stream, undisturbed
from tests.e2e.models import FABLE

pytestmark = pytest.mark.timeout(600)
SERVICE = "chat"
MODEL = "fable"
MODELS_MOUNT = "/models"
TOKENS = 200
READY_DEADLINE_S = 120
STEP_DEADLINE_S = 120
MIN_GENERATING = 8


@dataclass
class Life:
    """The service under test and what its streams are measured against."""

    cluster: Cluster
    namespace: str
    expected: list[dict[str, str]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)

    def address(self) -> str:
        """Of the Service, by its name, as any other pod would find it."""
        return f"{self.cluster.resolve(f'{SERVICE}-router.{self.namespace}.svc')}:{HTTP_PORT}"

    def pods(self, role: str, ready: bool = True) -> list[dict[str, Any]]:
        selector = f"lanewise.io/service={SERVICE},app.kubernetes.io/component={role}"
        return self.cluster.pods(self.namespace, selector, ready)

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

        wait_for(settled, f"{count} new {role} pods", STEP_DEADLINE_S, poll_s=0.3)

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
        "drain": {"timeout": "2s", "max": "2m"},
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


@pytest.fixture(scope="module")
def life(cluster: Cluster, chart: Chart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    assert chart
    namespace = f"life-{os.urandom(2).hex()}"
    cluster.kubectl("create", "namespace", namespace)
    weights = other_weights(tmp_path_factory.mktemp("weights") / "other")
    body = {
        "apiVersion": "lanewise.io/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": SERVICE, "namespace": namespace},
        "spec": spec(cluster, weights),
    }
    cluster.apply(body)
    life = Life(cluster, namespace)
    life.wait_ready()
    yield life
    cluster.kubectl("delete", "llmservice", SERVICE, "-n", namespace, "--wait=true", "--timeout=60s")
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def test_a_completion_streams_through_the_service(life: Life) -> None:
    started = time.monotonic()
    life.expected = [undisturbed(life.address, TOKENS)]
    assert len(set(life.expected[0].values())) > 8, "the prompts should have different continuations"
    sums: dict[str, float] = {}
    for pod in life.pods("router"):
        figures = scrape(f"{pod['status']['podIP']}:{HTTP_PORT}")
        assert figures is not None
        sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
    assert sums[TRANSFERS] > 0, "disaggregation Always, and no KV went from prefill to decode"
    say(f"16 streams of {TOKENS} tokens in {time.monotonic() - started:.1f} s, {sums[TRANSFERS]:.0f} KV transfers")


def test_streams_survive_what_happens_around_them(life: Life, chart: Chart) -> None:
    if not life.expected:
        life.expected = [undisturbed(life.address, TOKENS)]
    with Counters(life.cluster, life.namespace, SERVICE) as counters, Load(life.address, TOKENS) as load:
        for name, action in steps(life, chart):
            step(life, load, counters, name, action)
    life.wait_ready()
    streams = [stream for stream in load.streams if stream.ended is not None]
    altered = [stream for stream in streams if not stream.failed and life.is_altered(stream)]
    say(f"{len(streams)} streams in all")
    assert not [stream for stream in streams if stream.failed]
    assert not altered, altered[:2]


def step(life: Life, load: Load, counters: Counters, name: str, action: Callable[[], None]) -> None:
    """Does something to the service while streams run, and waits until all of these have ended."""
    wait_for(lambda: len(load.generating()) >= MIN_GENERATING, "streams past their first token", STEP_DEADLINE_S)
    started, before, first = time.monotonic(), counters.sums(), len(load.streams)
    hit = load.generating()
    action()
    took = time.monotonic() - started
    wait_for(lambda: all(stream.ended for stream in hit), "the streams that were hit to end", STEP_DEADLINE_S)
    after = counters.sums()
    figures = {key: after[counter] - before[counter] for key, counter in COLUMNS.items()}
    seen = [stream for stream in load.streams[first:] if stream.ended] + hit
    failed = [stream for stream in seen if stream.failed]
    altered = [stream for stream in seen if not stream.failed and life.is_altered(stream)]
    figures |= {"failed": len(failed), "altered": len(altered)}
    row = "".join(f"{key} {value:<5}" for key, value in figures.items())
    say(f"{name:<34} {took:5.1f} s  streams {len(hit):<3} {row}")
    assert not failed, f"{name}: {[stream.error for stream in failed][:3]}"


COLUMNS = {"transfers": TRANSFERS, "resumed": RESUMED, "held": HELD}


def steps(life: Life, chart: Chart) -> Iterator[tuple[str, Callable[[], None]]]:
    """The disturbances, in order."""
    yield "scale decode 1 -> 3", lambda: scale(life, 3)
    yield "scale decode 3 -> 1", lambda: scale(life, 1)
    yield "roll, same fingerprint", lambda: roll_annotation(life)
    yield "roll, other weights", lambda: roll_weights(life)
    yield "delete the only decode pod", lambda: replace(life, "decode", delete)
    yield "evict a prefill pod", lambda: replace(life, "prefill", evict)
    yield "delete a router pod", lambda: replace(life, "router", delete)
    yield "kill the leading operator", lambda: kill_leader(chart)
    yield "restart the API server", life.cluster.restart_apiserver
    yield "helm upgrade", lambda: upgrade(life, chart)


def scale(life: Life, replicas: int) -> None:
    life.patch({"decode": {"replicas": replicas}})
    life.wait_pods("decode", replicas)


def roll_annotation(life: Life) -> None:
    """Changes what pods look like, not what they compute."""
    before = {role: life.uids(role) for role in ("prefill", "decode")}
    current = life.cluster.get("llmservice", SERVICE, life.namespace)["spec"]
    for role in before:
        current[role]["podTemplate"]["metadata"] = {"annotations": {"test/rolled": str(time.time())}}
    life.patch({role: {"podTemplate": current[role]["podTemplate"]} for role in before})
    for role, old in before.items():
        life.wait_pods(role, len(old), without=old)


def roll_weights(life: Life) -> None:
    """Changes the fingerprint: streams end with the weights they began with, later ones say something else."""
    before = {role: life.uids(role) for role in ("prefill", "decode")}
    life.patch({"model": {"uri": f"file://{MODELS_MOUNT}/other"}})
    for role, old in before.items():
        life.wait_pods(role, len(old), without=old)
    life.wait_ready()
    life.expected.append(undisturbed(life.address, TOKENS))
    assert life.expected[0] != life.expected[1], "the other weights say the same"


def replace(life: Life, role: str, remove: Callable[[Life, str], None]) -> None:
    pods = life.pods(role)
    victim = pods[0]["metadata"]
    remove(life, victim["name"])
    life.wait_pods(role, len(pods), without={victim["uid"]})


def delete(life: Life, pod: str) -> None:
    life.cluster.kubectl("delete", "pod", pod, "-n", life.namespace, "--wait=false")


def evict(life: Life, pod: str) -> None:
    """As `kubectl drain` does: asks again while the disruption budget says no."""
    meta = {"name": pod, "namespace": life.namespace}
    body = json.dumps({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta})
    path = f"/api/v1/namespaces/{life.namespace}/pods/{pod}/eviction"
    wait_for(lambda: life.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=body), f"{pod} to be evicted", 60)


def kill_leader(chart: Chart) -> None:
    old = wait_for(chart.leader, "a leader", 30)
    chart.cluster.kubectl("delete", "pod", old, "-n", chart.namespace, "--grace-period=0", "--force")
    wait_for(lambda: chart.leader() not in ("", old), "another leader", 40)


def upgrade(life: Life, chart: Chart) -> None:
    """A new operator, and not one pod of a service is replaced by it."""
    before = life.all_uids()
    chart.upgrade("podAnnotations.test/upgraded=yes")
    wait_for(chart.leader, "a leader of the new release", 40)
    assert life.all_uids() == before


def say(text: str) -> None:
    """Into the log of the run, whatever pytest captures."""
    print(text, file=sys.__stderr__, flush=True)
