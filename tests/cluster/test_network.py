"""Who may open a connection to whom: every pair of pods and every port, judged by cyclonus from what we install.

The node's network plug-in enforces no policies, so they are evaluated offline; needs the cyclonus and helm programs, no
cluster. What is not in FLOWS must be refused.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lanewise.cli import main
from tests.cluster.kube.chart import CHART
from tests.cluster.kube.tools import program

NAMESPACE, OTHER, SYSTEM, MONITORING, KEDA = "team", "other", "lanewise-system", "monitoring", "keda"
HTTP, GRPC, WORKER, KV, METRICS, PROGRESS = 8000, 50051, 50061, 50071, 8080, 8080
HEALTH, KV_DATA = 50062, 50072
DNS, API = 53, 443
PORTS = {HTTP: "http", GRPC: "grpc", WORKER: "grpc", KV: "kv", METRICS: "metrics", API: "https", 22: "ssh"}
PORTS |= {HEALTH: "health", KV_DATA: "kv-data"}
SERVICE = """
apiVersion: lanewise.io/v1alpha1
kind: LLMService
metadata: {name: %s, namespace: team}
spec:
  model: {uri: "hf://owner/name", cache: {size: 10Gi}}
"""
SEALED = "  transfer: {encryption: Authenticated, secretRef: {name: keys}}\n"


@dataclass(frozen=True)
class Peer:
    """A pod; without a namespace something outside the cluster."""

    namespace: str
    labels: tuple[tuple[str, str], ...] = ()

    def as_json(self) -> dict[str, Any]:
        if not self.namespace:
            return {"Internal": None, "IP": "203.0.113.9"}
        internal = {
            "PodLabels": dict(self.labels),
            "NamespaceLabels": {"kubernetes.io/metadata.name": self.namespace},
            "Namespace": self.namespace,
        }
        return {"Internal": internal, "IP": "10.244.0.9"}


def ours(component: str, service: str = "chat", namespace: str = NAMESPACE) -> Peer:
    labels = {"app.kubernetes.io/name": "lanewise", "app.kubernetes.io/instance": service}
    labels |= {"app.kubernetes.io/component": component, "app.kubernetes.io/managed-by": "lanewise-operator"}
    return Peer(namespace, tuple((labels | {"lanewise.io/service": service}).items()))


def named(name: str, namespace: str, **more: str) -> Peer:
    return Peer(
        namespace, (("app.kubernetes.io/name", name), *((f"app.kubernetes.io/{k}", v) for k, v in more.items()))
    )


PEERS = {
    "router": ours("router"),
    "prefill": ours("prefill"),
    "decode": ours("decode"),
    "download": ours("download"),
    "router of another service": ours("router", "mail"),
    "prefill of another service": ours("prefill", "mail"),
    "router elsewhere": ours("router", namespace=OTHER),
    "prefill elsewhere": ours("prefill", namespace=OTHER),
    "operator": named("lanewise", SYSTEM, instance="lanewise", component="operator"),
    "test of the chart": named("lanewise", SYSTEM, instance="lanewise", component="test"),
    "prometheus": named("prometheus", MONITORING),
    "keda": named("keda-operator", KEDA),
    "client": named("shop", OTHER),
    "neighbour": named("shop", NAMESPACE),
    "outside": Peer(""),
}
EVERYONE = frozenset(PEERS)
FLOWS: dict[tuple[str, int], frozenset[str]] = {
    ("router", HTTP): EVERYONE,  # clients; Prometheus too
    ("router", GRPC): EVERYONE,  # clients, operator, KEDA
    ("prefill", WORKER): frozenset({"router"}),
    ("decode", WORKER): frozenset({"router"}),
    ("decode", KV): frozenset({"prefill"}),
    ("decode", KV_DATA): frozenset({"prefill"}),
    ("prefill", METRICS): frozenset({"prometheus"}),
    ("decode", METRICS): frozenset({"prometheus"}),
    ("download", PROGRESS): frozenset({"operator"}),
    ("operator", METRICS): frozenset({"prometheus", "test of the chart"}),
}
"""(to, port) -> from. Everything else is refused at these five."""
GUARDED = ("router", "prefill", "decode", "download", "operator")


@pytest.fixture(scope="module", autouse=True)
def _built(programs: None) -> None:
    """helm and cyclonus are built."""


def service_policies(folder: Path, capsys: pytest.CaptureFixture[str], more: str = "") -> list[dict[str, Any]]:
    """Of two services side by side, before their models are there (so that downloads are running)."""
    found = []
    for name in ("chat", "mail"):
        path = folder / f"{name}.yaml"
        path.write_text(SERVICE % name + more)
        capsys.readouterr()
        assert main(["manifests", str(path), "--json"]) == 0
        found += json.loads(capsys.readouterr().out)["items"]
    return [item for item in found if item["kind"] == "NetworkPolicy"]


def chart_policies(*args: str) -> list[dict[str, Any]]:
    command = [program("helm"), "template", "lanewise", str(CHART), "-n", SYSTEM, *args]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return [item for item in yaml.safe_load_all(text) if item and item["kind"] == "NetworkPolicy"]


def allowed(folder: Path, policies: list[dict[str, Any]], traffic: list[dict[str, Any]]) -> list[bool]:
    (folder / "policies").mkdir()
    for index, policy in enumerate(policies):
        (folder / "policies" / f"{index}.yaml").write_text(yaml.safe_dump(policy))
    (folder / "traffic.json").write_text(json.dumps(traffic))
    command = [program("cyclonus"), "analyze", "--mode", "query-traffic"]
    command += ["--policy-path", str(folder / "policies"), "--traffic-path", str(folder / "traffic.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [word == "TRUE" for word in re.findall(r"IS ALLOWED\?\s*\|\s*(TRUE|FALSE)", done.stdout)]
    assert len(found) == len(traffic), done.stdout[-2000:]
    return found


def packet(source: str, target: str, port: int) -> dict[str, Any]:
    name = PORTS[port]
    both = {"Source": PEERS[source].as_json(), "Destination": PEERS[target].as_json()}
    return {**both, "Protocol": "TCP", "ResolvedPort": port, "ResolvedPortName": name}


def test_every_flow_and_its_negation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = service_policies(tmp_path, capsys) + chart_policies()
    cases = [(source, target, port) for target in GUARDED for port in PORTS for source in PEERS if source != target]
    answers = allowed(tmp_path, policies, [packet(*case) for case in cases])
    wanted = [source in FLOWS.get((target, port), ()) for source, target, port in cases]
    wrong = [
        f"{source} -> {target}:{port} is {'allowed' if answer else 'refused'}"
        for (source, target, port), answer, want in zip(cases, answers, wanted, strict=True)
        if answer != want
    ]
    assert wrong == []
    assert sum(wanted) >= len(FLOWS) + 2 * (len(PEERS) - 2)


def test_the_data_port_of_an_encrypted_service_is_open_to_its_prefill_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Probes on the health port come from the node, which no policy rules."""
    policies = service_policies(tmp_path, capsys, SEALED)
    cases = [(source, "decode", port) for port in (KV, KV_DATA, HEALTH) for source in PEERS if source != "decode"]
    answers = allowed(tmp_path, policies, [packet(*case) for case in cases])
    found = {(source, port) for (source, _, port), answer in zip(cases, answers, strict=True) if answer}
    assert found == {("prefill", KV), ("prefill", KV_DATA)}


def test_nothing_of_ours_is_kept_from_going_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Egress is the cluster's to rule unless it is asked for."""
    policies = service_policies(tmp_path, capsys) + chart_policies()
    answers = allowed(tmp_path, policies, [packet(source, "outside", API) for source in GUARDED])
    assert answers == [True] * len(GUARDED)


def test_egress_of_the_operator_when_it_is_asked_for(tmp_path: Path) -> None:
    policies = chart_policies("--set", "networkPolicy.egress.enabled=true")
    wanted = {
        ("outside", API): True,  # the API server is no pod
        ("router", GRPC): True,
        ("download", PROGRESS): True,
        ("outside", 22): False,
        ("router", HTTP): False,
        ("client", HTTP): False,
        ("client", METRICS): False,
        ("decode", KV): False,
    }
    answers = allowed(tmp_path, policies, [packet("operator", target, port) for target, port in wanted])
    assert dict(zip(wanted, answers, strict=True)) == wanted


def test_a_policy_for_every_pod_that_we_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pod that no policy selects would be open to everybody."""
    selected = [policy["spec"]["podSelector"]["matchLabels"] for policy in service_policies(tmp_path, capsys)]
    for role in ("router", "prefill", "decode", "download"):
        labels = dict(ours(role).labels)
        assert any(labels.items() >= wanted.items() for wanted in selected), role
