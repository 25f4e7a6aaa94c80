"""A ScalingPolicy on a real cluster: the right role grows and shrinks, budgets hold at every second, zero and back.

The node advertises GPUs that no container touches; each worker asks for one and may use a quarter of a core, so that
three workers really do compute more than one on this machine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import aiohttp
import pytest

from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for
from tests.cluster.scaled import (
    BUDGET,
    DECODE_LOAD,
    GPUS,
    PERIOD_S,
    PREFILL_LOAD,
    READY_S,
    SERVICE,
    SHORT_PROMPT,
    GpuWatch,
    Scaled,
    Users,
    advertise,
    one,
    say,
    spec,
)

pytestmark = pytest.mark.timeout(900)


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


@pytest.mark.slow  # several minutes
def test_the_right_role_grows_shrinks_and_the_budget_holds_every_second(scaled: Scaled) -> None:
    wait_for(lambda: scaled.condition("Active") == "True", "the policy to be Active", 60)
    wait_for(lambda: scaled.replicas() == (1, 1), "one worker of each role", 30)
    addresses = scaled.routers()
    with GpuWatch(scaled) as gpus:
        for role, body in (("prefill", PREFILL_LOAD), ("decode", DECODE_LOAD)):
            index = ("prefill", "decode").index(role)
            with Users(addresses, body) as users:
                wait_for(lambda users=users: len(users.ended) >= 16, "the first requests", 60)  # type: ignore[misc]
                before, since = scaled.throttled(role), time.monotonic()
                time.sleep(6)
                bitten = scaled.throttled(role) - before
                scaled.wait_replicas(f"{role} to grow", lambda *n, i=index: n[i] > 1)
                alone = users.rate(since)
                scaled.wait_replicas(f"{role} to grow to 3", lambda *n, i=index: n[i] == 3)
                wait_for(lambda role=role: len(scaled.pods(role)) == 3, f"3 {role} pods", 60)  # type: ignore[misc]
                assert scaled.replicas()[1 - index] == 1, f"only {role} was short, got {scaled.replicas()}"
                time.sleep(10)
                since = time.monotonic()
                time.sleep(20)
                three = users.rate(since)
            assert not users.failures, users.failures[:3]
            say(
                f"{role}: {alone:.2f} requests/s per worker with 1, {three / 3:.2f} with 3; the quota stopped the "
                f"first {bitten} times in 6 s; {users.shed} answers to come later; ended by second: {users.by_second()}"
            )
            assert bitten > 0, "the CPU quota should bite"
            assert three > 1.5 * alone, "three workers should do more than one"
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
