"""The operator at work on a real API: drift, pause, refusals in the API's own words, conditions, order of a rollout."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.cluster.idle import idle_service, wait_observed
from tests.cluster.kube.audit import service_account
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for

pytestmark = pytest.mark.usefixtures("chart")

NAME = "chat"
REPAIR_S = 20.0
STEADY_S = 15.0
ALL = {
    "Ready",
    "Progressing",
    "Degraded",
    "ModelReady",
    "RouterReady",
    "PrefillReady",
    "DecodeReady",
    "KVPathReady",
    "DisaggregationBeneficial",
}


@pytest.fixture
def idle(cluster: Cluster, namespace: str) -> str:
    """Namespace of a service whose pods stay Pending."""
    cluster.apply(idle_service(NAME, namespace, disaggregation="Always"))
    wait_observed(cluster, NAME, namespace)
    return namespace


def patch(cluster: Cluster, namespace: str, text: str, kind: str = "merge") -> dict[str, Any]:
    cluster.kubectl("patch", "llmservice", NAME, "-n", namespace, f"--type={kind}", "-p", text)
    return wait_observed(cluster, NAME, namespace)


def degraded(service: dict[str, Any]) -> tuple[str, str]:
    """(reason, message), once it is True."""
    found = [item for item in service.get("status", {}).get("conditions", []) if item["type"] == "Degraded"]
    assert found
    assert found[0]["status"] == "True", found
    return found[0]["reason"], found[0]["message"]


def wait_degraded(cluster: Cluster, namespace: str, reason: str) -> str:
    def look() -> str | None:
        found, message = degraded(cluster.get("llmservice", NAME, namespace))
        assert found == reason, f"{found}: {message}"
        return message

    return wait_for(look, f"Degraded/{reason}", REPAIR_S)


# ---------------------------------------------------------------- what is there stays as it should be


def test_every_child_exists_and_says_whose_it_is(cluster: Cluster, idle: str) -> None:
    uid = cluster.get("llmservice", NAME, idle)["metadata"]["uid"]
    kinds = "deployment,service,serviceaccount,configmap,rolebinding,pdb,networkpolicy,controllerrevision"
    found = cluster.items(kinds, idle, f"lanewise.io/service={NAME}")
    names = {(item["kind"], item["metadata"]["name"]) for item in found}
    assert {("Deployment", f"{NAME}-{role}") for role in ("router", "prefill", "decode")} <= names
    assert {("PodDisruptionBudget", f"{NAME}-{role}") for role in ("router", "prefill", "decode")} <= names
    assert ("RoleBinding", f"{NAME}-router") in names
    for item in found:
        if item["kind"] == "ControllerRevision" and item["metadata"]["ownerReferences"][0]["kind"] == "Deployment":
            continue
        assert item["metadata"]["ownerReferences"][0]["uid"] == uid, item["metadata"]["name"]
        assert "finalizers" not in item["metadata"]


def test_deleted_children_come_back(cluster: Cluster, idle: str) -> None:
    children = {
        "deployment": f"{NAME}-decode",
        "service": f"{NAME}-routers",
        "serviceaccount": f"{NAME}-router",
        "configmap": f"{NAME}-config",
        "rolebinding": f"{NAME}-router",
        "pdb": f"{NAME}-prefill",
        "networkpolicy": f"{NAME}-decode",
    }
    before = {kind: cluster.get(kind, name, idle)["metadata"]["uid"] for kind, name in children.items()}
    for kind, name in children.items():
        cluster.delete(kind, name, idle, "--wait=false")
    for kind, name in children.items():
        wait_for(
            lambda kind=kind, name=name: cluster.get(kind, name, idle)["metadata"]["uid"] != before[kind],  # type: ignore[misc]
            f"a new {kind}",
            REPAIR_S,
        )


def test_an_edited_child_is_put_right(cluster: Cluster, idle: str) -> None:
    edits = {
        "deployment": ("decode", '{"spec": {"replicas": 3, "template": {"spec": {"enableServiceLinks": true}}}}'),
        "networkpolicy": ("decode", '{"spec": {"ingress": [{}]}}'),
        "pdb": ("prefill", '{"spec": {"maxUnavailable": 0}}'),
        "configmap": ("config", '{"data": {"router.yaml": "{}"}}'),
    }
    before = {kind: cluster.get(kind, f"{NAME}-{part}", idle) for kind, (part, _) in edits.items()}
    for kind, (part, text) in edits.items():
        cluster.kubectl("patch", kind, f"{NAME}-{part}", "-n", idle, "--type=merge", "-p", text)

    def same() -> bool:
        for kind, (part, _) in edits.items():
            found = cluster.get(kind, f"{NAME}-{part}", idle)
            wanted = before[kind].get("spec", before[kind].get("data"))
            assert found.get("spec", found.get("data")) == wanted, kind
        return True

    wait_for(same, "every edit to be undone", REPAIR_S)


def test_paused_means_hands_off(cluster: Cluster, idle: str) -> None:
    paused = patch(cluster, idle, '{"spec": {"paused": true}}')
    reasons = {item["type"]: item["reason"] for item in paused["status"]["conditions"]}
    assert reasons["Progressing"] == "Paused"
    cluster.delete("service", f"{NAME}-prefill", idle)
    mark = cluster.audit.mark()
    cluster.kubectl("label", "pdb", f"{NAME}-decode", "-n", idle, "touched=yes")  # an event that would wake it
    time.sleep(3)
    assert cluster.find("service", f"{NAME}-prefill", idle) is None
    operator = service_account("lanewise", "lanewise")
    writes = [item for item in cluster.audit.events(mark, user=operator, namespace=idle) if item.is_write]
    assert writes == []
    patch(cluster, idle, '{"spec": {"paused": false}}')
    wait_for(lambda: cluster.find("service", f"{NAME}-prefill", idle), "the Service to return", REPAIR_S)


def test_a_steady_service_is_written_to_by_nobody(cluster: Cluster, idle: str) -> None:
    wait_for(lambda: len(cluster.items("pods", idle, f"lanewise.io/service={NAME}")) == 3, "its pods", REPAIR_S)
    time.sleep(5)
    mark = cluster.audit.mark()
    time.sleep(STEADY_S)
    operator = service_account("lanewise", "lanewise")
    writes = [item for item in cluster.audit.events(mark, user=operator) if item.is_write and item.namespace == idle]
    assert [(item.verb, item.kind, item.name) for item in writes] == []


# ---------------------------------------------------------------- what is refused is said


def test_a_template_that_fits_no_schema_is_named_by_its_path(cluster: Cluster, idle: str) -> None:
    patch(cluster, idle, '{"spec": {"decode": {"podTemplate": {"spec": {"containrs": []}}}}}')
    message = wait_degraded(cluster, idle, "PodTemplateInvalid")
    assert "spec.decode.podTemplate.spec.containrs" in message
    assert "containrs" not in str(cluster.get("deployment", f"{NAME}-decode", idle)["spec"])
    patch(cluster, idle, '{"spec": {"decode": {"podTemplate": {"spec": {"containrs": null}}}}}')
    wait_for(lambda: condition(cluster.get("llmservice", NAME, idle), "Degraded") == "False", "no complaint", REPAIR_S)


def test_a_value_that_is_not_allowed_leaves_every_role_as_it_is(cluster: Cluster, idle: str) -> None:
    before = {role: cluster.get("deployment", f"{NAME}-{role}", idle)["spec"] for role in ("router", "decode")}
    bad = '{"containers": [{"name": "worker", "imagePullPolicy": "Sometimes"}]}'
    spec = f'{{"slo": {{"tpot": "77ms"}}, "decode": {{"podTemplate": {{"spec": {bad}}}}}}}'
    patch(cluster, idle, f'{{"spec": {spec}}}')
    message = wait_degraded(cluster, idle, "PodTemplateInvalid")
    assert "spec.decode.podTemplate.spec.containers[0].imagePullPolicy" in message
    assert {role: cluster.get("deployment", f"{NAME}-{role}", idle)["spec"] for role in before} == before


def test_quota_is_told_in_the_apis_words(cluster: Cluster, idle: str) -> None:
    hard = {"spec": {"hard": {"services": "1"}}}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, **hard}
    cluster.apply(quota, namespace=idle)
    wait_for(lambda: cluster.get("resourcequota", "few", idle)["status"]["used"], "the quota to count", REPAIR_S)
    cluster.delete("service", f"{NAME}-prefill", idle)
    assert "exceeded quota: few" in wait_degraded(cluster, idle, "QuotaExceeded")
    cluster.delete("resourcequota", "few", idle)
    wait_for(lambda: cluster.find("service", f"{NAME}-prefill", idle), "another try", 60)


def test_pods_that_admission_refuses_are_told_in_its_words(cluster: Cluster, namespace: str) -> None:
    label = "pod-security.kubernetes.io/enforce=restricted"
    cluster.kubectl("label", "namespace", namespace, label)
    root = {"securityContext": {"runAsNonRoot": False, "runAsUser": 0}}
    template = {"spec": {"nodeSelector": {"test/nowhere": "true"}, **root}}
    cluster.apply(idle_service(NAME, namespace, decode={"podTemplate": template}))
    message = wait_degraded(cluster, namespace, "PodsRefused")
    assert 'violates PodSecurity "restricted:latest"' in message
    pods = cluster.items("pods", namespace, f"lanewise.io/service={NAME}")
    roles = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods}
    assert roles == {"router", "prefill"}, "what the operator renders by itself passes the Restricted profile"


def test_what_this_version_cannot_do_is_said_and_nothing_is_made(cluster: Cluster, namespace: str) -> None:
    cluster.apply(idle_service(NAME, namespace, transfer={"channel": "NCCL"}))
    assert wait_degraded(cluster, namespace, "Unsupported").startswith("spec.transfer.channel")
    assert cluster.items("deployment,service", namespace, f"lanewise.io/service={NAME}") == []


def test_a_version_that_is_not_known_is_said(cluster: Cluster, idle: str) -> None:
    before = cluster.get("deployment", f"{NAME}-decode", idle)["metadata"]["generation"]
    patch(cluster, idle, '{"spec": {"runtime": {"version": "9.9.9"}}}')
    assert "expected one of 0.1.0" in wait_degraded(cluster, idle, "UnknownRuntime")
    assert cluster.get("deployment", f"{NAME}-decode", idle)["metadata"]["generation"] == before


# ---------------------------------------------------------------- status


def test_conditions_carry_their_generation_and_keep_their_time(cluster: Cluster, idle: str) -> None:
    first = cluster.get("llmservice", NAME, idle)
    assert {item["type"] for item in first["status"]["conditions"]} == ALL
    assert condition(first, "Ready") == "False"
    assert condition(first, "KVPathReady") == "Unknown"
    times = {item["type"]: item["lastTransitionTime"] for item in first["status"]["conditions"]}
    time.sleep(1.1)
    later = patch(cluster, idle, '{"spec": {"slo": {"tpot": "60ms"}}}')
    for item in later["status"]["conditions"]:
        assert item["observedGeneration"] == later["metadata"]["generation"]
        assert item["lastTransitionTime"] == times[item["type"]], item
    assert later["status"]["runtime"]["workerImage"] == cluster.images.worker
    assert later["status"]["decode"]["summary"] == "0/1"
    columns = cluster.kubectl("get", "llmservice", NAME, "-n", idle)
    assert columns.splitlines()[0].split() == ["NAME", "READY", "P", "D", "ROUTER", "REASON", "URL", "AGE"]
    events = cluster.items("events", idle)
    about = [item for item in events if item["involvedObject"]["kind"] == "LLMService"]
    assert len(about) <= 3, "Events are for turns, not for looks"


# ---------------------------------------------------------------- rollout


def sleeper(image: str) -> dict[str, Any]:
    """A podTemplate whose container does nothing, and is Ready at once."""
    probes = {f"{name}Probe": None for name in ("startup", "liveness", "readiness")}
    container = {"name": "worker", "image": image, "command": ["sleep", "100000"], "lifecycle": None, **probes}
    return {"spec": {"terminationGracePeriodSeconds": 1, "containers": [container]}}


@pytest.fixture
def sleeping(cluster: Cluster, namespace: str) -> str:
    """Namespace of a service with workers that are Ready and do nothing."""
    worker = {"replicas": 2, "podTemplate": sleeper(cluster.images.app)}
    cluster.apply(idle_service(NAME, namespace, prefill=worker, decode=worker))
    wait_for(lambda: settled(cluster, namespace), "workers to be Ready", 90)
    return namespace


def deployments(cluster: Cluster, namespace: str) -> dict[str, dict[str, Any]]:
    found = cluster.items("deployment", namespace, f"lanewise.io/service={NAME}")
    return {item["metadata"]["labels"]["app.kubernetes.io/component"]: item for item in found}


def fingerprint(deployment: dict[str, Any]) -> str:
    return str(deployment["spec"]["template"]["metadata"]["annotations"]["lanewise.io/fingerprint"])


def complete(deployment: dict[str, Any]) -> bool:
    status, wanted = deployment["status"], deployment["spec"]["replicas"]
    seen = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    counts = {status.get(name) for name in ("updatedReplicas", "replicas", "availableReplicas")}
    return bool(seen) and counts == {wanted}


def settled(cluster: Cluster, namespace: str) -> bool:
    found = deployments(cluster, namespace)
    return {"prefill", "decode"} <= set(found) and complete(found["prefill"]) and complete(found["decode"])


def test_a_new_fingerprint_goes_to_decode_first(cluster: Cluster, sleeping: str) -> None:
    old = fingerprint(deployments(cluster, sleeping)["decode"])
    patch(cluster, sleeping, '{"spec": {"model": {"dtype": "float32"}}}')
    seen: list[tuple[bool, bool, bool]] = []  # prefill is new, decode is new, decode is complete

    def both_new() -> bool:
        found = deployments(cluster, sleeping)
        new = [fingerprint(found[role]) != old for role in ("prefill", "decode")]
        seen.append((*new, complete(found["decode"])))  # type: ignore[arg-type]
        return all(new) and settled(cluster, sleeping)

    wait_for(both_new, "both roles to be replaced", 120)
    assert (False, True, False) in seen, "decode was seen rolling while prefill stood"
    first = next(state for state in seen if state[0])
    assert first[1:] == (True, True), "prefill moved before decode was complete"


def test_a_stalled_decode_leaves_prefill_with_its_old_template_and_configuration(
    cluster: Cluster, sleeping: str
) -> None:
    before = deployments(cluster, sleeping)["prefill"]
    config = cluster.get("configmap", f"{NAME}-config", sleeping)["data"]
    broken = sleeper("registry.local/none:1")
    broken["spec"]["containers"][0]["imagePullPolicy"] = "Never"
    workers = {"prefill": sleeper(cluster.images.app), "decode": broken}
    roles = {role: {"replicas": 2, "podTemplate": template} for role, template in workers.items()}
    changed = idle_service(NAME, sleeping, model={"uri": "builtin://fable", "dtype": "float32"}, **roles)
    cluster.apply(changed)  # not patched: a merge patch loses the nulls of a podTemplate
    wait_observed(cluster, NAME, sleeping)
    assert "ErrImageNeverPull" in wait_degraded(cluster, sleeping, "PodsFailing")
    cluster.delete("deployment", f"{NAME}-router", sleeping)  # events enough to tempt it
    cluster.kubectl("scale", "deployment", f"{NAME}-prefill", "-n", sleeping, "--replicas=5")
    wait_for(lambda: deployments(cluster, sleeping).get("router"), "the router to return", REPAIR_S)
    now = wait_for(
        lambda: (found := deployments(cluster, sleeping)["prefill"])["spec"]["replicas"] == 2 and found,
        "a held role to keep its count",
        REPAIR_S,
    )
    assert now["spec"]["template"] == before["spec"]["template"]
    data = cluster.get("configmap", f"{NAME}-config", sleeping)["data"]
    assert data["prefill.yaml"] == config["prefill.yaml"]
    assert data["decode.yaml"] != config["decode.yaml"]
    service = cluster.get("llmservice", NAME, sleeping)
    assert {item["type"]: item["reason"] for item in service["status"]["conditions"]}["Progressing"] == "RollingDecode"


def test_a_change_within_the_fingerprint_rolls_both_at_once(cluster: Cluster, sleeping: str) -> None:
    before = {role: fingerprint(item) for role, item in deployments(cluster, sleeping).items() if role != "router"}
    generations = {role: item["metadata"]["generation"] for role, item in deployments(cluster, sleeping).items()}
    patch(cluster, sleeping, '{"spec": {"slo": {"ttft": "333ms"}}}')
    found = deployments(cluster, sleeping)
    assert {role: fingerprint(found[role]) for role in before} == before
    assert all(found[role]["metadata"]["generation"] > generations[role] for role in generations)
    wait_for(lambda: settled(cluster, sleeping), "both to settle", 90)
