"""`lanewise manifests` and `kubectl lanewise status | scaling`, as a person calls them."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from lanewise import cli
from lanewise.operator import kubectl

HERE = Path(__file__).parent
FABLE = HERE / "services" / "fable.yaml"


def test_manifests_prints_what_would_be_applied(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["manifests", str(FABLE), "--namespace", "here", "--worker-image", "w:1"]) == 0
    said = capsys.readouterr()
    objects = list(yaml.safe_load_all(said.out))
    assert {item["metadata"]["namespace"] for item in objects} == {"here"}
    assert all("ownerReferences" not in item["metadata"] for item in objects)
    deployments = {item["metadata"]["name"]: item for item in objects if item["kind"] == "Deployment"}
    assert set(deployments) == {"fable-router", "fable-prefill", "fable-decode"}
    assert deployments["fable-decode"]["spec"]["template"]["spec"]["containers"][0]["image"] == "w:1"
    assert "&id" not in said.out
    assert said.err == ""


def test_manifests_as_json_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(HERE / "services" / "full.yaml")
    assert cli.main(["manifests", file, "--json"]) == 0
    said = capsys.readouterr()
    kinds = [item["kind"] for item in json.loads(said.out)["items"]]
    assert kinds.count("Deployment") == 1
    assert "workers follow once the model is downloaded" in said.err
    assert "Unsupported" not in said.err
    assert cli.main(["manifests", file, "--json", "--commit", "0" * 40, "--monitors"]) == 0
    kinds = [item["kind"] for item in json.loads(capsys.readouterr().out)["items"]]
    assert kinds.count("Deployment") == 3
    assert {"PodMonitor", "ServiceMonitor"} <= set(kinds)


def test_manifests_says_what_the_operator_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(FABLE.read_text() + "\n  transfer: {channel: NCCL}\n")
    assert cli.main(["manifests", str(file)]) == 0
    assert "Degraded/Unsupported): spec.transfer.channel" in capsys.readouterr().err


def test_manifests_of_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text("a: 1")
    assert cli.main(["manifests", str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml" in capsys.readouterr().err


# ---------------------------------------------------------------- kubectl lanewise


def resource(name: str, ready: str) -> dict[str, Any]:
    condition = {"type": "Ready", "status": ready, "reason": "Because", "message": "of this"}
    degraded = {"type": "Degraded", "status": "False", "reason": "AsExpected"}
    runtime = {"version": "0.1.0", "workerImage": "w:1"}
    status = {
        "conditions": [condition, degraded],
        "decode": {"ready": 2, "desired": 3, "draining": 1},
        "lanes": [{"name": "short", "maxTokens": 256, "workers": 1, "ttftP99": "35ms"}],
        "runtime": runtime,
        "url": "http://x",
    }
    spec = {"model": {"uri": "builtin://fable"}}
    return {"metadata": {"name": name, "namespace": "chat"}, "spec": spec, "status": status}


def policy(name: str, status: dict[str, Any]) -> dict[str, Any]:
    roles = {"prefill": {"min": 1, "max": 8}, "decode": {"max": 4}}
    spec = {"targetRef": {"name": "fable"}, **roles}
    return {"metadata": {"name": name, "namespace": "chat"}, "spec": spec, "status": status}


DECISION = {
    "time": "2026-01-05T08:00:00Z",
    "prefill": 3,
    "decode": 2,
    "inputs": "requests per s 8.5",
    "requirement": "3 prefill + 2 decode",
    "reason": "8.50 requests/s [busy]: to 3 prefill + 2 decode",
}
ACTIVE = {"type": "Active", "status": "True", "reason": "Deciding", "message": "scales both roles"}
CONFLICT = {"type": "Active", "status": "False", "reason": "Conflict", "message": "ScalingPolicy good is older"}
LISTS = {
    "llmservices": [resource("good", "True"), resource("bad", "False")],
    "scalingpolicies": [
        policy("good", {"conditions": [ACTIVE], "current": DECISION, "history": [DECISION]}),
        policy("late", {"conditions": [CONFLICT]}),
    ],
}


class Api(BaseHTTPRequestHandler):
    """The API server's lists of our kinds in namespace `chat`."""

    def do_GET(self) -> None:
        found = LISTS.get(self.path.removeprefix("/apis/lanewise.io/v1alpha1/namespaces/chat/"))
        body = json.dumps({"items": found} if found else {}).encode()
        self.send_response(200 if found else 403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": "chat"}}],
        "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "x", "user": {"token": "t"}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    try:
        yield str(tmp_path / "config")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def called(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        kubectl.main(argv)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_status_of_one_service(kubeconfig: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("status", "good", "--kubeconfig", kubeconfig) == 0
    said = capsys.readouterr().out
    for word in ("chat/good", "version 0.1.0", "w:1", "short", "256", "35ms", "Degraded", "of this"):
        assert word in said
    assert "chat/bad" not in said


def test_status_fails_when_one_is_not_ready(kubeconfig: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("status", "--kubeconfig", kubeconfig, "--json") == 1
    assert [item["name"] for item in json.loads(capsys.readouterr().out)] == ["good", "bad"]


def test_status_says_what_is_wrong(kubeconfig: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("status", "none", "--kubeconfig", kubeconfig) == 1
    assert "no LLMService none" in capsys.readouterr().err
    assert called("status", "-n", "other", "--kubeconfig", kubeconfig) == 1
    assert "403" in capsys.readouterr().err
    assert called("status", "--kubeconfig", kubeconfig + "x") == 1
    assert called("nonsense") == 2


def test_scaling_of_one_policy_tells_inputs_requirement_and_decision(
    kubeconfig: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("scaling", "good", "--kubeconfig", kubeconfig) == 0
    said = capsys.readouterr().out
    for words in ("scales LLMService fable", "prefill 1-8, decode 1-4", "requests per s 8.5", "3 prefill + 2 decode"):
        assert words in said
    assert said.count("[busy]") == 2, "a reason is shown as it is, now and in the history"
    assert "2026-01-05T08:00:00Z" in said
    assert called("scaling", "late", "--kubeconfig", kubeconfig) == 1
    said = capsys.readouterr().out
    assert "no decision yet" in said
    assert "ScalingPolicy good is older" in said
    assert called("scaling", "none", "--kubeconfig", kubeconfig) == 1
    assert "no ScalingPolicy none" in capsys.readouterr().err
