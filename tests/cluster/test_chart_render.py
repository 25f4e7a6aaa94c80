"""The chart as text: lint, values schema, and what ten sets of values render to. Needs the helm program, no cluster."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lanewise import __version__
from lanewise.config import OperatorConfig, parse_config
from lanewise.operator.crd import definitions
from tests.cluster.kube.chart import CHART
from tests.cluster.kube.tools import program

ROOT = CHART.parents[2]
NAMESPACE = "lanewise-system"
DIGEST = "sha256:" + "0123456789abcdef" * 4
PROMETHEUS_API = "monitoring.coreos.com/v1"
Manifest = dict[str, Any]

SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "namespaced": {"watchNamespaces": ["team-a", "team-b"]},
    "digests": {"images": {"control": {"digest": DIGEST, "tag": "v9"}, "worker": {"digest": DIGEST}}},
    "registry": {
        "images": {
            "pullPolicy": "Always",
            "pullSecrets": ["one", "two"],
            "control": {"repository": "registry.example:5000/a/control", "tag": "v1"},
            "worker": {"repository": "registry.example:5000/a/worker", "tag": "v2"},
        }
    },
    "least": {
        "replicas": 1,
        "crds": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "rbac": {"aggregate": False},
    },
    "monitored": {"monitoring": {"enabled": True, "labels": {"release": "prometheus"}, "interval": "10s"}},
    "egress": {"networkPolicy": {"egress": {"enabled": True}}},
    "accounts-of-others": {
        "rbac": {"create": False, "routerClusterRole": "given-router"},
        "serviceAccount": {"create": False, "name": "given"},
    },
    "scheduled": {
        "nodeSelector": {"pool": "control"},
        "tolerations": [{"key": "control", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
        "priorityClassName": "system-cluster-critical",
        "podLabels": {"team": "a"},
        "podAnnotations": {"note": "b"},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "resources": {"requests": {"cpu": 1}, "limits": {"cpu": "2", "memory": "1Gi"}},
    },
    "named": {"fullnameOverride": "x" * 40, "nameOverride": "other", "log": {"level": "debug", "format": "text"}},
    "team-without-cluster-rights": {
        "watchNamespaces": [NAMESPACE],
        "crds": {"enabled": False},
        "rbac": {"aggregate": False, "routerClusterRole": "shared-router"},
    },
}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown value": ({"replcas": 3}, "replcas"),
    "unknown nested value": ({"images": {"control": {"name": "x"}}}, "name"),
    "replicas as text": ({"replicas": "2"}, "replicas"),
    "negative replicas": ({"replicas": -1}, "replicas"),
    "namespace in capitals": ({"watchNamespaces": ["Team"]}, "watchNamespaces"),
    "namespace twice": ({"watchNamespaces": ["a", "a"]}, "watchNamespaces"),
    "digest without its algorithm": ({"images": {"control": {"digest": "0123"}}}, "digest"),
    "repository with a tag": ({"images": {"worker": {"repository": "a/b:v1"}}}, "repository"),
    "pull policy": ({"images": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    "log level": ({"log": {"level": "loud"}}, "level"),
    "monitoring": ({"monitoring": {"enabled": "maybe"}}, "enabled"),
    "number as a label": ({"podLabels": {"a": 1}}, "podLabels"),
    "resource quantity": ({"resources": {"limits": {"memory": "1GiB"}}}, "memory"),
    "crds": ({"crds": {"enabled": "yes"}}, "crds"),
}


@pytest.fixture(scope="module", autouse=True)
def _helm(programs: None) -> None:
    """helm is built."""


def helm(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("helm"), *args], capture_output=True, text=True, timeout=60)


def values_file(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def render(folder: Path, values: dict[str, Any], *args: str, release: str = "lanewise") -> list[Manifest]:
    done = helm("template", release, str(CHART), "-n", NAMESPACE, "-f", values_file(folder, values), *args)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def find(objects: list[Manifest], kind: str, name: str | None = None) -> list[Manifest]:
    return [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]


def one(objects: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    (found,) = find(objects, kind, name)
    return found


def rules_of(objects: list[Manifest]) -> list[tuple[str, Manifest]]:
    roles = find(objects, "Role") + find(objects, "ClusterRole")
    return [(role["metadata"]["name"], rule) for role in roles for rule in role["rules"]]


# ---------------------------------------------------------------- for every set of values


@pytest.mark.parametrize("name", SETS)
def test_lint(name: str, tmp_path: Path) -> None:
    done = helm("lint", "--strict", str(CHART), "-f", values_file(tmp_path, SETS[name]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("name", SETS)
def test_what_every_object_has(name: str, tmp_path: Path) -> None:
    objects = render(tmp_path, SETS[name])
    assert len(
        {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects}
    ) == len(objects)
    for item in objects:
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "lanewise"
        assert labels["app.kubernetes.io/instance"] == "lanewise"
        assert labels["app.kubernetes.io/version"] == __version__
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["helm.sh/chart"] == f"lanewise-{__version__}"
        cluster_wide = item["kind"].startswith(("ClusterRole", "CustomResourceDefinition"))
        assert ("namespace" in item["metadata"]) != cluster_wide, item["metadata"]
        assert len(item["metadata"]["name"]) <= 253


@pytest.mark.parametrize("name", SETS)
def test_the_pods(name: str, tmp_path: Path) -> None:
    objects = render(tmp_path, SETS[name])
    deployment = one(objects, "Deployment")
    template = deployment["spec"]["template"]
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= template["metadata"]["labels"].items()
    assert one(objects, "Service")["spec"]["selector"] == selector
    for pod in (template["spec"], one(objects, "Pod")["spec"]):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = container["securityContext"]
        assert security == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"]
    (operator,) = template["spec"]["containers"]
    assert {probe for probe in operator if probe.endswith("Probe")} == {
        "startupProbe",
        "livenessProbe",
        "readinessProbe",
    }
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    image = operator["image"]
    wanted = SETS[name].get("images", {}).get("control", {})
    tail = f"@{wanted['digest']}" if "digest" in wanted else f":{wanted.get('tag', __version__)}"
    assert image == wanted.get("repository", "ghcr.io/lanewise/control") + tail


@pytest.mark.parametrize("name", SETS)
def test_rights_are_the_least(name: str, tmp_path: Path) -> None:
    objects = render(tmp_path, SETS[name], "--api-versions", PROMETHEUS_API)
    rules = rules_of(objects)
    for role, rule in rules:
        assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"], role
        assert "secrets" not in rule["resources"], role
        assert "nonResourceURLs" not in rule, role
        assert not {"escalate", "impersonate"} & set(rule["verbs"]), role
        if "clusterroles" in rule["resources"]:
            assert rule["verbs"] == ["bind"]
            assert len(rule["resourceNames"]) == 1
            assert rule["resourceNames"][0] == config_of(objects)["router_cluster_role"]
    bound = {item["roleRef"]["name"] for kind in ("RoleBinding", "ClusterRoleBinding") for item in find(objects, kind)}
    assert not any(role.endswith("-router") for role in bound), "the operator binds it, per service"
    if SETS[name].get("rbac", {}).get("create", True):
        account = one(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
        subjects = [
            subject
            for kind in ("RoleBinding", "ClusterRoleBinding")
            for item in find(objects, kind)
            for subject in item["subjects"]
        ]
        assert subjects
        assert {(subject["name"], subject["namespace"]) for subject in subjects} == {(account, NAMESPACE)}
    else:
        assert rules == []


@pytest.mark.parametrize("name", SETS)
def test_the_operator_understands_its_configuration(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = render(tmp_path, SETS[name])
    path = tmp_path / "operator.yaml"
    path.write_text(one(objects, "ConfigMap")["data"]["operator.yaml"])
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    monkeypatch.setenv("LANEWISE_CONFIG", str(path))
    given = {
        item["name"]: "x" for item in container["env"] if item["name"].startswith("LANEWISE_") and "valueFrom" in item
    }
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    config = parse_config(OperatorConfig, [])
    assert given.keys() == {f"LANEWISE_{key}" for key in ("NAME", "POD_NAME", "POD_NAMESPACE", "POD_UID")}
    assert list(config.namespaces) == SETS[name].get("watchNamespaces", [])
    assert config.control_image == container["image"]
    assert config.lease_namespace == NAMESPACE
    assert config.http.endswith(f":{container['ports'][0]['containerPort']}")


def config_of(objects: list[Manifest]) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(one(objects, "ConfigMap")["data"]["operator.yaml"])
    return found


# ---------------------------------------------------------------- what single values do


@pytest.mark.parametrize("case", WRONG)
def test_the_schema_refuses(case: str, tmp_path: Path) -> None:
    values, named = WRONG[case]
    done = helm("template", "lanewise", str(CHART), "-f", values_file(tmp_path, values))
    assert done.returncode != 0
    assert named in done.stderr, done.stderr


def test_definitions_are_what_the_command_prints(tmp_path: Path) -> None:
    found = find(render(tmp_path, {}), "CustomResourceDefinition")
    assert [item["spec"] for item in found] == [item["spec"] for item in definitions()]
    assert all(item["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for item in found)
    assert find(render(tmp_path, {"crds": {"enabled": False}}), "CustomResourceDefinition") == []


def test_namespaced_needs_no_right_elsewhere(tmp_path: Path) -> None:
    objects = render(tmp_path, SETS["namespaced"])
    assert find(objects, "ClusterRoleBinding") == []
    places = {(role["metadata"]["namespace"], role["metadata"]["name"]) for role in find(objects, "Role")}
    assert {place for place, _ in places} == {"team-a", "team-b", NAMESPACE}
    own = [
        rule for role in find(objects, "Role") if role["metadata"]["namespace"] == NAMESPACE for rule in role["rules"]
    ]
    assert {resource for rule in own for resource in rule["resources"]} == {"leases"}
    least = render(tmp_path, SETS["team-without-cluster-rights"])
    assert not [item for item in least if "namespace" not in item["metadata"]], "a team can install this by itself"


def test_monitoring_follows_what_the_cluster_has(tmp_path: Path) -> None:
    def monitors(objects: list[Manifest]) -> tuple[int, bool]:
        mentioned = any("podmonitors" in rule["resources"] for _, rule in rules_of(objects))
        return len(find(objects, "PodMonitor")), mentioned

    assert monitors(render(tmp_path, {})) == (0, False)
    assert monitors(render(tmp_path, {}, "--api-versions", PROMETHEUS_API)) == (1, True)
    assert monitors(render(tmp_path, SETS["monitored"])) == (1, True)
    off = {"monitoring": {"enabled": False}}
    assert monitors(render(tmp_path, off, "--api-versions", PROMETHEUS_API)) == (0, False)


def test_a_new_configuration_restarts_the_operator_and_nothing_else_does(tmp_path: Path) -> None:
    def pods(values: dict[str, Any]) -> Manifest:
        found: Manifest = one(render(tmp_path, values), "Deployment")["spec"]["template"]
        return found

    assert pods({}) == pods({"monitoring": {"enabled": True}, "rbac": {"aggregate": False}, "replicas": 3})
    assert pods({}) != pods({"images": {"worker": {"tag": "v2"}}})


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        ("lanewise", {}, "lanewise"),
        ("prod", {}, "prod-lanewise"),
        ("my-lanewise", {}, "my-lanewise"),
        ("prod", {"nameOverride": "llm"}, "prod-llm"),
        ("prod", {"fullnameOverride": "just-this"}, "just-this"),
        ("a" * 53, {}, "a" * 40),
    ],
)
def test_names(release: str, values: dict[str, Any], name: str, tmp_path: Path) -> None:
    objects = render(tmp_path, values, release=release)
    assert one(objects, "Deployment")["metadata"]["name"] == name
    assert one(objects, "ClusterRoleBinding")["metadata"]["name"] == f"{name}-{NAMESPACE}"
    assert config_of(objects)["lease_name"] == name


# ---------------------------------------------------------------- files that must agree


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_every_value_has_a_schema_and_a_description() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert keys(values, schema) == set()
    found = importlib.util.spec_from_file_location("chart_values", ROOT / "tools" / "chart_values.py")
    assert found is not None
    assert found.loader is not None
    chart_values = importlib.util.module_from_spec(found)
    found.loader.exec_module(chart_values)
    page = (ROOT / "docs" / "chart.md").read_text()
    assert chart_values.page(page) == page, "run python tools/chart_values.py"
    told = {path for path, _ in chart_values.described((CHART / "values.yaml").read_text())}
    assert (
        leaves(values) - told - {path for path in leaves(values) if any(path.startswith(f"{top}.") for top in told)}
        == set()
    )


def keys(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> set[str]:
    """Values without a schema and schema entries without a value (`global` is Helm's, claims are a pod's)."""
    known = schema.get("properties")
    if known is None or not isinstance(values, dict):
        return set()
    assert schema["additionalProperties"] is False, path
    found = {f"{path}{key}" for key in values.keys() ^ known.keys()} - {"global", "resources.claims"}
    found = {item for item in found if not item.startswith("affinity.")}
    return found.union(*(keys(values[key], known[key], f"{path}{key}.") for key in values.keys() & known.keys()))


def leaves(values: Any, path: str = "") -> set[str]:
    if isinstance(values, dict) and values:
        return set().union(*(leaves(value, f"{path}.{key}".lstrip(".")) for key, value in values.items()))
    return {path}


def test_the_images_file_only_runs_the_script() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    ran = [line for line in lines if line.startswith("RUN")]
    allowed = ("pip wheel", "build-root.sh", "apt-get install --yes --no-install-recommends g++")
    assert all(any(words in line for words in allowed) for line in ran), ran
    assert sum("build-root.sh" in line for line in ran) == 2
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 65532:65532"] * 2
    assert [re.split(r" AS ", line)[1] for line in lines if line.startswith("FROM")][-2:] == ["worker", "control"]
