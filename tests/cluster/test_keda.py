"""KEDA's own operator and adapter drive the real HPA controller through the routers' external scaler.

Both roles of a service whose replicas are omitted belong to a ScaledObject each: prefill with a trigger of type
`external`, decode with `external-push`. They go to zero, wake together, follow load up and down, and lose nothing.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from tests.cluster.kube import keda
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster, NotOurs, condition
from tests.cluster.kube.tools import wait_for
from tests.cluster.scaled import (
    DECODE_LOAD,
    PREFILL_LOAD,
    READY_S,
    SERVICE,
    SHORT_PROMPT,
    Scaled,
    Users,
    advertise,
    one,
    say,
    spec,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4000)]  # KEDA is built the first time
TRIGGERS = {"prefill": "external", "decode": "external-push"}
TARGETS: dict[str, dict[str, str]] = {"prefill": {}, "decode": {"target": "40"}}  # {}: the scaler's own
GRPC_PORT = 50051
MOST = 3
USERS = 32
POLLING_S, COOLDOWN_S, STABILIZATION_S = 5, 20, 15
HPA_MOVE_S = 180  # the HPA controller looks every 15 s; a starting pod takes a while
POOL = "8Mi"  # of KV, so small that the streams fill more than one


def scaled_object(namespace: str, role: str) -> dict[str, Any]:
    """As docs/scaling.md shows it, with shorter times."""
    metadata = {"scalerAddress": f"{SERVICE}-router.{namespace}.svc:{GRPC_PORT}", "role": role, **TARGETS[role]}
    down = {"scaleDown": {"stabilizationWindowSeconds": STABILIZATION_S}}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": f"{SERVICE}-{role}", "namespace": namespace},
        "spec": {
            "scaleTargetRef": {"name": f"{SERVICE}-{role}"},
            "minReplicaCount": 0,
            "maxReplicaCount": MOST,
            "pollingInterval": POLLING_S,
            "cooldownPeriod": COOLDOWN_S,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": down}},
            "triggers": [{"type": TRIGGERS[role], "metadata": metadata}],
        },
    }


@pytest.fixture(scope="module")
def scaled(cluster: Cluster, chart: Chart) -> Iterator[Scaled]:
    """The service with one worker of each role, scaled by nobody yet; KEDA is there."""
    try:
        assert cluster.slot
    except NotOurs as error:
        pytest.skip(str(error))
    keda.build()
    advertise(cluster, 2 * MOST)
    namespace = f"keda-{os.urandom(2).hex()}"
    cluster.kubectl("create", "namespace", namespace)
    wanted = spec(cluster)
    wanted["decode"] = {**wanted["decode"], "kvCacheMemory": POOL}
    metadata = {"name": SERVICE, "namespace": namespace}
    cluster.apply({"apiVersion": "lanewise.io/v1alpha1", "kind": "LLMService", "metadata": metadata, "spec": wanted})
    made = Scaled(cluster, namespace)
    with keda.running(cluster):
        wait_for(lambda: ready(made), f"{SERVICE} to be Ready", READY_S, poll_s=0.5)
        assert made.replicas() == (1, 1)
        yield made
        cluster.kubectl("delete", "scaledobjects", "--all", "-n", namespace, "--timeout=60s")
    cluster.kubectl("delete", "llmservice", SERVICE, "-n", namespace, "--wait=true", "--timeout=60s")
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")
    advertise(cluster, 0)


def ready(scaled: Scaled) -> bool:
    return condition(scaled.cluster.get("llmservice", SERVICE, scaled.namespace), "Ready") == "True"


def hpa(scaled: Scaled, role: str) -> dict[str, Any]:
    """The HorizontalPodAutoscaler that KEDA made for a role."""
    return scaled.cluster.get("horizontalpodautoscaler", f"keda-hpa-{SERVICE}-{role}", scaled.namespace)


def first_answers(scaled: Scaled) -> float:
    """Seconds until every router has answered a request sent now; fails where one does not."""
    addresses = scaled.routers()
    assert len(addresses) == 2
    users = Users(addresses, {"prompt": SHORT_PROMPT, "max_tokens": 5})

    async def ask() -> None:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=150)) as session,
            asyncio.TaskGroup() as all_,
        ):
            for number, address in enumerate(addresses):
                all_.create_task(one(session, address, users.body, number, users))

    started = time.monotonic()
    asyncio.run(ask())
    assert not users.failures, users.failures
    return time.monotonic() - started


def test_keda_takes_both_roles_to_zero_and_the_first_requests_bring_them_back(scaled: Scaled) -> None:
    scaled.cluster.apply(*(scaled_object(scaled.namespace, role) for role in TRIGGERS))
    for role in TRIGGERS:
        name = f"{SERVICE}-{role}"
        wait_for(
            lambda name=name: condition(scaled.cluster.get("scaledobject", name, scaled.namespace), "Ready") == "True",  # type: ignore[misc]
            f"ScaledObject {name} to be Ready",
            60,
        )
        made = hpa(scaled, role)["spec"]
        assert made["scaleTargetRef"]["name"] == name
        assert made["metrics"][0]["external"]["metric"]["name"] == f"s0-lanewise-{role}-load"
    scaled.wait_replicas("both roles at zero", lambda p, d: (p, d) == (0, 0))
    wait_for(lambda: not scaled.pods("prefill", ready=False) + scaled.pods("decode", ready=False), "no worker", 90)
    wait_for(lambda: ready(scaled), "Ready while there is no worker", 60)
    took = first_answers(scaled)
    say(f"KEDA, from zero: first answers of both routers after {took:.1f} s")
    assert all(count >= 1 for count in scaled.replicas())


@pytest.mark.parametrize("role", TRIGGERS)
def test_the_hpa_of_keda_follows_a_role_up_and_down_and_nothing_is_lost(scaled: Scaled, role: str) -> None:
    index = tuple(TRIGGERS).index(role)
    load = {"prefill": PREFILL_LOAD, "decode": DECODE_LOAD}[role]
    addresses = scaled.routers()
    with Users(addresses, {"prompt": SHORT_PROMPT, "max_tokens": 30}, count=1) as steady:  # keeps both roles awake
        scaled.wait_replicas("one worker of each role", lambda p, d: (p, d) == (1, 1), HPA_MOVE_S)
        with Users(addresses, load, USERS) as users:
            started = time.monotonic()
            scaled.wait_replicas(f"{role} to grow to {MOST}", lambda *n: n[index] == MOST, HPA_MOVE_S)
            grown = time.monotonic() - started
            status = hpa(scaled, role)["status"]
            wait_for(lambda: len(scaled.pods(role)) == MOST, f"{MOST} ready {role} pods", HPA_MOVE_S)
        ended = time.monotonic()
        assert status["desiredReplicas"] == MOST
        assert "lastScaleTime" in status
        scaled.wait_replicas(f"{role} to shrink to 1", lambda *n: n[index] == 1, HPA_MOVE_S)
        shrunk = time.monotonic() - ended
        wait_for(lambda: len(scaled.pods(role, ready=False)) == 1, f"1 {role} pod", HPA_MOVE_S)
    say(
        f"KEDA, {role} ({TRIGGERS[role]}): {MOST} asked for {grown:.0f} s after the load began, 1 again {shrunk:.0f} s "
        f"after it ended; {len(users.ended)} + {len(steady.ended)} requests, {users.shed + steady.shed} sent away"
    )
    assert users.ended
    assert not users.failures + steady.failures, (users.failures + steady.failures)[:3]


def test_idle_again_both_roles_go_to_zero(scaled: Scaled) -> None:
    started = time.monotonic()
    scaled.wait_replicas("both roles at zero", lambda p, d: (p, d) == (0, 0), HPA_MOVE_S)
    say(f"KEDA, idle: both roles at zero after {time.monotonic() - started:.0f} s (cooldownPeriod {COOLDOWN_S} s)")
    first_answers(scaled)


def test_a_policy_beside_a_scaled_object_is_refused_and_names_both(scaled: Scaled) -> None:
    scaled.apply_policy()
    wait_for(lambda: scaled.condition("Active") == "False", "the policy to be refused", 60)
    words = next(c for c in scaled.status()["conditions"] if c["type"] == "Active")
    assert words["reason"] == "Conflict"
    for name in (
        f"HorizontalPodAutoscaler keda-hpa-{SERVICE}-",
        f"of ScaledObject {SERVICE}-",
        f"ScalingPolicy {SERVICE}",
    ):
        assert name in words["message"], words["message"]
    scaled.cluster.kubectl("delete", "scaledobjects", "--all", "-n", scaled.namespace, "--timeout=60s")
    wait_for(lambda: scaled.condition("Active") == "True", "the policy to be Active without them", 60)
    wait_for(lambda: all(count >= 1 for count in scaled.replicas()), "the policy's minimum of both roles", 60)
    scaled.cluster.delete("scalingpolicy", SERVICE, scaled.namespace)
