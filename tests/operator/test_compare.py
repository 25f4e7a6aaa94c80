"""Whether a live object is what was wanted: defaults and other people's fields do not count, drift does."""

from copy import deepcopy
from typing import Any

import pytest

from lanewise.operator.compare import differences, stamped

WANTED: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "x", "namespace": "n", "labels": {"a": "1"}},
    "spec": {
        "template": {
            "spec": {
                "containers": [
                    {
                        "name": "worker",
                        "command": ["a", "b"],
                        "env": [{"name": "A", "value": "1"}],
                        "ports": [{"name": "g", "containerPort": 1, "protocol": "TCP"}],
                        "resources": {"limits": {"cpu": "0.5", "memory": "1024Mi"}},
                        "startupProbe": {"grpc": {"port": 1, "service": ""}},
                    }
                ],
                "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"sizeLimit": "1024Mi"}}],
            }
        }
    },
}
POLICY: dict[str, Any] = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "x", "namespace": "n"},
    "spec": {"ingress": [{"ports": [{"port": 1, "protocol": "TCP"}]}]},
}


def live(wanted: dict[str, Any] = WANTED) -> dict[str, Any]:
    """As the API server would keep it: stamped, with defaults and a status."""
    made = deepcopy(stamped(wanted))
    made["metadata"] |= {"uid": "u", "resourceVersion": "5", "generation": 1}
    made["status"] = {"replicas": 1}
    if wanted is WANTED:
        made["spec"]["replicas"] = 1
        pod = made["spec"]["template"]["spec"]
        pod["restartPolicy"] = "Always"
        pod["containers"][0]["resources"]["limits"] = {"cpu": "500m", "memory": "1Gi"}
        pod["containers"][0]["terminationMessagePath"] = "/dev/termination-log"
        pod["volumes"][1]["emptyDir"]["sizeLimit"] = "1Gi"
    return made


def container(found: dict[str, Any]) -> dict[str, Any]:
    item: dict[str, Any] = found["spec"]["template"]["spec"]["containers"][0]
    return item


@pytest.mark.parametrize("wanted", [WANTED, POLICY], ids=["deployment", "policy"])
def test_defaults_are_no_difference(wanted: dict[str, Any]) -> None:
    assert differences(wanted, live(wanted)) == []


def test_missing() -> None:
    assert differences(WANTED, None) == ["missing"]


def test_what_others_add_is_theirs() -> None:
    found = live()
    container(found)["env"].insert(0, {"name": "INJECTED", "value": "x"})
    found["spec"]["template"]["spec"]["containers"].insert(0, {"name": "sidecar"})
    found["metadata"]["labels"]["b"] = "2"
    assert differences(WANTED, found) == []


def test_drift_is_found_by_its_path() -> None:
    found = live()
    container(found)["env"][0]["value"] = "2"
    container(found)["command"] = ["a"]
    container(found)["resources"]["limits"]["cpu"] = "1"
    del found["metadata"]["labels"]["a"]
    assert differences(WANTED, found) == [
        "metadata.labels.a",
        "spec.template.spec.containers[worker].command",
        "spec.template.spec.containers[worker].env[A].value",
        "spec.template.spec.containers[worker].resources.limits.cpu",
    ]


def test_an_entry_that_was_removed_is_found() -> None:
    found = live()
    found["spec"]["template"]["spec"]["volumes"].pop(0)
    assert differences(WANTED, found) == ["spec.template.spec.volumes[tmp]"]


def test_a_field_that_is_not_wanted_any_more_is_found_by_the_stamp() -> None:
    before = deepcopy(WANTED)
    before["spec"]["replicas"] = 3
    assert differences(WANTED, live(before))[-1].endswith("applied-hash")


def test_a_door_that_somebody_opened_is_found() -> None:
    found = live(POLICY)
    found["spec"]["ingress"][0]["ports"].append({"port": 22, "protocol": "TCP"})
    assert differences(POLICY, found) == ["spec.ingress[0].ports"]
    found = live(POLICY)
    found["spec"]["ingress"].append({})
    assert differences(POLICY, found) == ["spec.ingress"]
