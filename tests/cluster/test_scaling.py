"""A ScalingPolicy on a real cluster: the right role grows and shrinks, budgets hold at every second, zero and back.

The node advertises GPUs that no container touches; each worker asks for one and may use a quarter of a core, so that
three workers really do compute more than one on this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
import pytest

from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for

pytestmark = pytest.mark.timeout(900)
SERVICE, MODEL, HTTP_PORT = "scaled", "fable", 8000
GPUS, BUDGET = 5, 4
PERIOD_S = 3
READY_S, MOVE_S = 120, 120
RETRIES = 30
LONG_PROMPT = "A fox saw a crow with a piece of cheese in her beak, high upon the branch of a tree. " * 12
SHORT_PROMPT = "Once"
PREFILL_LOAD = {"prompt": LONG_PROMPT, "max_tokens": 2}
DECODE_LOAD = {"prompt": SHORT_PROMPT, "max_tokens": 200}


def spec(cluster: Cluster) -> dict[str, Any]:
    worker = {
        "resources": {"requests": {"cpu": "50m"}, "limits": {"cpu": "250m", "nvidia.com/gpu": 1}},
        "podTemplate": cluster.worker_pod_template(),
    }
    return {
        "model": {"uri": f"builtin://{MODEL}", "servedName": MODEL},
        "slo": {"ttft": "400ms", "tpot": "15ms"},  # what a quarter of a core cannot give to many at once
        "disaggregation": "Always",
        "drain": {"timeout": "2s", "max": "30s"},
        "prefill": worker,
        "decode": worker,
        "router": {"replicas": 2, "resources": {"requests": {"cpu": "50m"}}},
    }


def policy(**changes: Any) -> dict[str, Any]:
    return {
        "targetRef": {"name": SERVICE},
        "prefill": {"min": 1, "max": 3},
        "decode": {"min": 1, "max": 3},
        "budget": {"gpus": BUDGET},
        "behavior": {"scaleUp": {"blockedAfter": "20s"}, "scaleDown": {"stabilization": "15s"}},
        **changes,
    }


@dataclass
class Scaled:
    """The service under test."""

    cluster: Cluster
    namespace: str

    def apply_policy(self, name: str = SERVICE, **changes: Any) -> None:
        metadata = {"name": name, "namespace": self.namespace}
        body = {"apiVersion": "lanewise.io/v1alpha1", "kind": "ScalingPolicy", "metadata": metadata}
        self.cluster.apply(body | {"spec": policy(**changes)})

    def status(self, name: str = SERVICE) -> dict[str, Any]:
        return dict(self.cluster.get("scalingpolicy", name, self.namespace).get("status", {}))

    def condition(self, kind: str, name: str = SERVICE) -> str:
        return condition(self.cluster.get("scalingpolicy", name, self.namespace), kind)

    def replicas(self) -> tuple[int, int]:
        found = [self.cluster.get("deployment", f"{SERVICE}-{role}", self.namespace) for role in ("prefill", "decode")]
        return found[0]["spec"]["replicas"], found[1]["spec"]["replicas"]

    def pods(self, role: str, ready: bool = True) -> list[dict[str, Any]]:
        selector = f"lanewise.io/service={SERVICE},app.kubernetes.io/component={role}"
        return self.cluster.pods(self.namespace, selector, ready)

    def routers(self) -> list[str]:
        return [f"{pod['status']['podIP']}:{HTTP_PORT}" for pod in self.pods("router")]

    def wait_replicas(self, what: str, probe: Any, deadline_s: float = MOVE_S) -> None:
        def told() -> bool:
            return bool(probe(*self.replicas()))

        try:
            wait_for(told, what, deadline_s, poll_s=0.5)
        except Exception:
            say(f"{what}: not reached; {json.dumps(self.status(), indent=1, ensure_ascii=False)}")
            raise


@pytest.fixture(scope="module")
def scaled(cluster: Cluster, chart: Chart) -> Iterator[Scaled]:
    chart.upgrade("extraEnv[0].name=LANEWISE_SCALING_PERIOD_S", f"extraEnv[0].value={PERIOD_S}")
    advertise(cluster, GPUS)
    namespace = f"scaling-{os.urandom(2).hex()}"
    cluster.kubectl("create", "namespace", namespace)
    made = Scaled(cluster, namespace)
    made.apply_policy()
    metadata = {"name": SERVICE, "namespace": namespace}
    cluster.apply(
        {"apiVersion": "lanewise.io/v1alpha1", "kind": "LLMService", "metadata": metadata, "spec": spec(cluster)}
    )

    def ready() -> bool:
        service = cluster.get("llmservice", SERVICE, namespace)
        return condition(service, "Ready") == "True"

    wait_for(ready, f"{SERVICE} to be Ready", READY_S, poll_s=0.5)
    yield made
    cluster.kubectl("delete", "llmservice", SERVICE, "-n", namespace, "--wait=true", "--timeout=60s")
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")
    advertise(cluster, 0)
    chart.upgrade()


def advertise(cluster: Cluster, count: int) -> None:
    """As a device plugin would: the node has this many GPUs."""
    (node,) = cluster.items("nodes")
    name = node["metadata"]["name"]
    value = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}]
    cluster.kubectl("patch", "node", name, "--subresource=status", "--type=json", "-p", json.dumps(value))

    def there() -> bool:
        (found,) = cluster.items("nodes")
        return str(found["status"]["allocatable"].get("nvidia.com/gpu", "0")) == str(count)

    wait_for(there, f"{count} GPUs to be allocatable", 60)


# ---------------------------------------------------------------- load and watching


@dataclass
class Users:
    """Closed-loop users at the routers' own addresses, in turn; each sends its next request when the last has ended."""

    addresses: list[str]
    body: dict[str, Any]
    count: int = 16
    ended: list[float] = field(default_factory=list)  # monotonic
    failures: list[str] = field(default_factory=list)
    shed: int = 0  # answers that said "later", each of them repeated

    def __enter__(self) -> Users:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="users", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "users did not end"

    def rate(self, seconds: float) -> float:
        """Requests a second that ended within the last `seconds`."""
        now = time.monotonic()
        return sum(now - at <= seconds for at in list(self.ended)) / seconds

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=100)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            for user in range(self.count):
                group.create_task(self._user(session, user))

    async def _user(self, session: aiohttp.ClientSession, user: int) -> None:
        number = user
        while not self._stop.is_set():
            number += 1
            await one(session, self.addresses[number % len(self.addresses)], self.body, number, self)


async def one(session: aiohttp.ClientSession, address: str, body: dict[str, Any], number: int, users: Users) -> None:
    payload = {"model": MODEL, "ignore_eos": True, **body, "prompt": f"{number}. {body['prompt']}"}
    try:
        for _ in range(RETRIES):  # as OpenAI's client does: 429 says when to come back
            async with session.post(f"http://{address}/v1/completions", json=payload) as reply:
                text = await reply.text()
                if reply.status != 429:
                    break
            users.shed += 1
            await asyncio.sleep(1.0)
        if reply.status != 200:
            users.failures.append(f"{reply.status}: {text[:300]}")
    except (aiohttp.ClientError, TimeoutError) as error:
        users.failures.append(f"{type(error).__name__}: {error}")
    users.ended.append(time.monotonic())


@dataclass
class GpuWatch:
    """GPUs that pods on the node hold, once a second."""

    scaled: Scaled
    seconds: list[tuple[float, int]] = field(default_factory=list)

    def __enter__(self) -> GpuWatch:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpus", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(30)

    def _watch(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(1.0):
            pods = self.scaled.cluster.items("pods", self.scaled.namespace, f"lanewise.io/service={SERVICE}")
            held = 0
            for pod in pods:
                if pod["spec"].get("nodeName") and pod["status"].get("phase") not in ("Succeeded", "Failed"):
                    limits = [c.get("resources", {}).get("limits", {}) for c in pod["spec"]["containers"]]
                    held += sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)
            self.seconds.append((round(time.monotonic() - started, 1), held))


# ---------------------------------------------------------------- tests, in this order


@pytest.mark.slow  # several minutes, and not yet seen through on a quiet machine
def test_the_right_role_grows_shrinks_and_the_budget_holds_every_second(scaled: Scaled) -> None:
    wait_for(lambda: scaled.condition("Active") == "True", "the policy to be Active", 60)
    wait_for(lambda: scaled.replicas() == (1, 1), "one worker of each role", 30)
    addresses = scaled.routers()
    with GpuWatch(scaled) as gpus:
        for role, body in (("prefill", PREFILL_LOAD), ("decode", DECODE_LOAD)):
            index = ("prefill", "decode").index(role)
            with Users(addresses, body) as users:
                wait_for(lambda users=users: len(users.ended) >= 16, "the first requests", 60)  # type: ignore[misc]
                time.sleep(6)
                alone = users.rate(6)
                scaled.wait_replicas(f"{role} to grow to 3", lambda *n, i=index: n[i] == 3)
                wait_for(lambda role=role: len(scaled.pods(role)) == 3, f"3 {role} pods", 60)  # type: ignore[misc]
                assert scaled.replicas()[1 - index] == 1, f"only {role} was short, got {scaled.replicas()}"
                time.sleep(10)
                three = users.rate(8)
            assert not users.failures, users.failures[:3]
            say(
                say(
                    f"{role}: {alone:.2f} requests/s with 1 worker, {three:.2f} with 3, {users.shed} told to come later"
                )
            )
            assert three > 1.5 * alone, "the CPU quota should bite: three workers do more than one"
            scaled.wait_replicas(f"{role} to shrink to 1", lambda *n, i=index: n[i] == 1)
            reasons = [f"{e['prefill']}+{e['decode']}: {e['reason']}" for e in scaled.status()["history"][:3]]
            say("\n".join(reasons))
    say(f"budget {BUDGET}, held by second: {' '.join(str(held) for _, held in gpus.seconds)}")
    assert gpus.seconds
    assert max(held for _, held in gpus.seconds) <= BUDGET


def test_pods_that_cannot_be_scheduled_are_taken_back(scaled: Scaled) -> None:
    wait_for(lambda: scaled.replicas() == (1, 1), "one worker of each role", 90)
    wait_for(lambda: not scaled.pods("prefill", ready=False)[1:], "no other prefill pod", 60)
    advertise(scaled.cluster, 2)  # what the two workers hold
    try:
        with Users(scaled.routers(), PREFILL_LOAD) as users:
            scaled.wait_replicas("prefill to be asked for more", lambda p, d: p > 1)
            since = time.monotonic()
            wait_for(lambda: scaled.condition("ScaleBlocked") == "True", "ScaleBlocked", 90, poll_s=0.5)
            took = time.monotonic() - since
            scaled.wait_replicas("the roll-back", lambda p, d: p == 1, 30)
        say(f"ScaleBlocked {took:.0f} s after the pods were asked for: {scaled.status()['current']['reason'][-200:]}")
        assert took < 20 + 3 * PERIOD_S + 15
        assert not users.failures, users.failures[:3]
    finally:
        advertise(scaled.cluster, GPUS)


def test_an_hpa_and_a_younger_policy_are_conflicts_that_name_both(scaled: Scaled) -> None:
    scaled.apply_policy("younger")
    wait_for(lambda: scaled.condition("Active", "younger") == "False", "the younger policy to be refused", 30)
    words = next(c for c in scaled.status("younger")["conditions"] if c["type"] == "Active")
    assert (words["reason"], SERVICE in words["message"]) == ("Conflict", True)
    scaled.cluster.delete("scalingpolicy", "younger", scaled.namespace)
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"{SERVICE}-decode"}
    hpa = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "mine", "namespace": scaled.namespace},
        "spec": {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 2},
    }
    scaled.cluster.apply(hpa)
    wait_for(lambda: scaled.condition("Active") == "False", "a conflict with the HPA", 30)
    words = next(c for c in scaled.status()["conditions"] if c["type"] == "Active")
    assert "HorizontalPodAutoscaler mine" in words["message"]
    assert f"ScalingPolicy {SERVICE}" in words["message"]
    scaled.cluster.delete("horizontalpodautoscaler", "mine", scaled.namespace)
    wait_for(lambda: scaled.condition("Active") == "True", "the policy to be Active again", 30)


def test_zero_and_back_with_two_routers(scaled: Scaled) -> None:
    scaled.apply_policy(scaleToZero={"after": "10s", "maxHold": "2m"})
    scaled.wait_replicas("both roles at zero", lambda p, d: (p, d) == (0, 0))
    wait_for(lambda: not scaled.pods("prefill", ready=False) + scaled.pods("decode", ready=False), "no worker", 90)
    addresses = scaled.routers()
    assert len(addresses) == 2
    users = Users(addresses, {"prompt": SHORT_PROMPT, "max_tokens": 5})
    started = time.monotonic()

    async def first_requests() -> None:
        timeout = aiohttp.ClientTimeout(total=150)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            for number, address in enumerate(addresses):
                group.create_task(one(session, address, users.body, number, users))

    asyncio.run(first_requests())
    say(f"from zero: first answers of both routers after {time.monotonic() - started:.1f} s")
    assert not users.failures, users.failures
    assert all(count >= 1 for count in scaled.replicas())


def say(text: str) -> None:
    """Into the log of the run, whatever pytest captures."""
    print(text, file=sys.__stderr__, flush=True)
