"""A service that is scaled on a real cluster: its resources, its users, what its pods hold.

Owns: what the tests of scaling share. Must not: assert anything about scale.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for

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
        "slo": {"ttft": "1s", "tpot": "15ms"},  # what a quarter of a core gives to one, and not to many at once
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
        """Of the policy; empty where there is none."""
        return dict((self.cluster.find("scalingpolicy", name, self.namespace) or {}).get("status", {}))

    def condition(self, kind: str, name: str = SERVICE) -> str:
        return condition(self.cluster.get("scalingpolicy", name, self.namespace), kind)

    def replicas(self) -> tuple[int, int]:
        found = [self.cluster.get("deployment", f"{SERVICE}-{role}", self.namespace) for role in ("prefill", "decode")]
        return found[0]["spec"]["replicas"], found[1]["spec"]["replicas"]

    def pods(self, role: str, ready: bool = True) -> list[dict[str, Any]]:
        selector = f"lanewise.io/service={SERVICE},app.kubernetes.io/component={role}"
        return self.cluster.pods(self.namespace, selector, ready)

    def throttled(self, role: str) -> int:
        """Periods in which the CPU quota stopped the first worker of a role."""
        processes = self.cluster.processes(self.pods(role)[0]["metadata"]["name"], self.namespace)
        return max(throttled_periods(process) for process in processes)  # the sandbox's has no quota

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


def throttled_periods(process: int) -> int:
    """`nr_throttled` of the cgroup a process is in, of either version."""
    for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/cpu", f"/sys/fs/cgroup/{controllers}"):
            file = Path(root + path) / "cpu.stat"
            if file.is_file():
                return next(int(row.split()[1]) for row in file.read_text().splitlines() if row.startswith("nr_thr"))
    raise AssertionError(f"process {process}: no cpu.stat in any of its cgroups")


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
    ended: list[tuple[float, float]] = field(default_factory=list)  # monotonic, and how long it took
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

    def rate(self, since: float) -> float:
        """Requests a second that ended since that moment (monotonic).

        Users who began together end together: the window must be long beside what one request takes. How long those
        took that ended would not do: workers serve the late last, and those have not ended.
        """
        now = time.monotonic()
        return sum(since <= at <= now for at, _ in list(self.ended)) / (now - since)

    def by_second(self) -> str:
        """How many ended in each second, for the log."""
        counts = Counter(int(at - self.ended[0][0]) for at, _ in list(self.ended))
        return " ".join(str(counts[second]) for second in range(max(counts) + 1))

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=100)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            for user in range(self.count):
                group.create_task(self._user(session, user))

    async def _user(self, session: aiohttp.ClientSession, user: int) -> None:
        """No two requests of all users are equal: what one worker has cached, three would have to compute again."""
        for number in itertools.count(user, self.count):
            if self._stop.is_set():
                return
            turn = (number // self.count + user) % len(self.addresses)
            await one(session, self.addresses[turn], self.body, number, self)


async def one(session: aiohttp.ClientSession, address: str, body: dict[str, Any], number: int, users: Users) -> None:
    started = time.monotonic()
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
    users.ended.append((time.monotonic(), time.monotonic() - started))


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


def say(text: str) -> None:
    """Into the log of the run, whatever pytest captures."""
    print(text, file=sys.__stderr__, flush=True)
