"""Merging a podTemplate: keyed lists element by element, everything else as the user wrote it."""

from copy import deepcopy
from typing import Any

import pytest

from lanewise.errors import ConfigError
from lanewise.operator.pod_template import merge_template

OURS: dict[str, Any] = {
    "metadata": {"labels": {"a": "1"}, "annotations": {}},
    "spec": {
        "containers": [
            {
                "name": "worker",
                "image": "x",
                "command": ["run"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "p"}}}],
                "ports": [{"name": "grpc", "containerPort": 1, "protocol": "TCP"}],
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1},
    },
}


def merged(**spec: Any) -> dict[str, Any]:
    before = deepcopy(OURS)
    made: dict[str, Any] = merge_template(OURS, {"metadata": {}, "spec": spec})["spec"]
    assert before == OURS
    return made


def worker(**fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = merged(containers=[{"name": "worker", **fields}])["containers"][0]
    return made


def test_nothing_changes_nothing() -> None:
    assert merge_template(OURS, None) == OURS
    assert merge_template(OURS, {"metadata": {}, "spec": {}}) == OURS


def test_environment_is_merged_by_name() -> None:
    env = worker(env=[{"name": "B", "value": "2"}, {"name": "C", "value": "3"}])["env"]
    assert env == [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}, {"name": "C", "value": "3"}]


def test_mounts_and_ports_have_their_own_keys() -> None:
    made = worker(
        volumeMounts=[{"name": "fast", "mountPath": "/tmp"}],
        ports=[{"containerPort": 1, "hostPort": 5}, {"containerPort": 2}],
    )
    assert made["volumeMounts"] == [{"name": "fast", "mountPath": "/tmp"}]
    assert made["ports"][0] == {"name": "grpc", "containerPort": 1, "protocol": "TCP", "hostPort": 5}
    assert made["ports"][1] == {"containerPort": 2}


def test_a_volume_has_one_source() -> None:
    claim = {"name": "tmp", "persistentVolumeClaim": {"claimName": "c"}}
    assert merged(volumes=[claim])["volumes"] == [claim]


def test_lists_without_a_key_are_replaced_and_tolerations_added() -> None:
    assert worker(command=["sh"])["command"] == ["sh"]
    first = merge_template(OURS, {"metadata": {}, "spec": {"tolerations": [{"key": "a"}]}})
    again = merge_template(first, {"metadata": {}, "spec": {"tolerations": [{"key": "a"}, {"key": "b"}]}})
    assert again["spec"]["tolerations"] == [{"key": "a"}, {"key": "b"}]


def test_null_removes() -> None:
    assert merged(securityContext={"runAsUser": None})["securityContext"] == {"runAsNonRoot": True}


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"containers": [{"image": "y"}]}, r"podTemplate\.spec\.containers\[0\]\.name: required"),
        ({"containers": {"name": "worker"}}, r"podTemplate\.spec\.containers: expected a list"),
        (
            {"containers": [{"name": "worker", "env": ["A=1"]}]},
            r"podTemplate\.spec\.containers\[0\]\.env\[0\]: expected",
        ),
        ({"securityContext": []}, r"podTemplate\.spec\.securityContext: expected a mapping"),
    ],
)
def test_what_has_no_meaning_is_named_by_its_path(spec: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        merged(**spec)
