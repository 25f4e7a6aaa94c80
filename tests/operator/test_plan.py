"""What is rendered for a service, held against golden manifests; and the rules that hold for every rendering."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lanewise.errors import ConfigError
from lanewise.operator.manifests import PlainDumper
from lanewise.operator.plan import plan, unsupported
from lanewise.operator.plan_config import fingerprint_hash
from lanewise.operator.plan_types import Plan, PlanContext
from lanewise.spec import LLMService
from lanewise.spec_status import RuntimeStatus
from lanewise.spec_yaml import read_service

HERE = Path(__file__).parent
SERVICES = sorted((HERE / "services").glob("*.yaml"))
RUNTIME = RuntimeStatus(
    version="0.1.0", rendering=1, control_image="example.com/control:0.1.0", worker_image="example.com/worker:0.1.0"
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def context(**changes: Any) -> PlanContext:
    fields: dict[str, Any] = {
        "namespace": "chat",
        "uid": "11111111-2222-3333-4444-555555555555",
        "runtime": RUNTIME,
        "router_cluster_role": "lanewise-router",
        "commit": COMMIT,
        "monitors": frozenset({"PodMonitor", "ServiceMonitor"}),
    }
    return PlanContext(**{**fields, **changes})


def service(name: str) -> LLMService:
    return read_service(HERE / "services" / f"{name}.yaml")


def changed(name: str, **spec: Any) -> LLMService:
    data = yaml.safe_load((HERE / "services" / f"{name}.yaml").read_text())
    for path, value in spec.items():
        *parents, last = path.split("__")
        target = data["spec"]
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return LLMService.model_validate(data)


def pods(made: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    for item in made.objects:
        if item["kind"] in ("Deployment", "Job"):
            yield item["metadata"]["name"], item["spec"]["template"]["spec"]


@pytest.mark.parametrize("file", SERVICES, ids=lambda path: path.stem)
def test_a_released_rendering_never_changes(file: Path) -> None:
    made = plan(read_service(file), context())
    text = yaml.dump_all(made.objects, Dumper=PlainDumper, sort_keys=True, explicit_start=True)
    golden = HERE / "golden" / "v1" / file.name
    if not golden.exists():
        golden.write_text(text)
        pytest.fail(f"{golden} did not exist and was written: look at it, then commit it")
    assert text == golden.read_text()


@pytest.mark.parametrize("file", SERVICES, ids=lambda path: path.stem)
def test_every_pod_is_restricted(file: Path) -> None:
    for name, pod in pods(plan(read_service(file), context())):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            if container["name"] == "sidecar":
                continue  # the user's
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert not any("hostPath" in volume for volume in pod["volumes"])


@pytest.mark.parametrize("file", SERVICES, ids=lambda path: path.stem)
def test_children_are_found_by_label_and_deleted_with_their_owner(file: Path) -> None:
    made = plan(read_service(file), context())
    names = [(item["kind"], item["metadata"]["name"]) for item in made.objects]
    assert len(set(names)) == len(names)
    for item in made.objects:
        assert item["metadata"]["labels"]["lanewise.io/service"] == read_service(file).metadata.name
        assert item["metadata"]["ownerReferences"][0]["uid"] == context().uid


def test_a_claim_that_is_retained_has_no_owner() -> None:
    made = plan(changed("full", model__cache__deletePolicy="Retain"), context())
    claims = [item for item in made.objects if item["kind"] == "PersistentVolumeClaim"]
    assert [claim["metadata"].get("ownerReferences") for claim in claims] == [None]


def test_replicas_are_written_only_where_the_resource_has_them() -> None:
    made = plan(service("full"), context()).deployments
    assert "replicas" not in made["prefill"]["spec"]
    assert made["decode"]["spec"]["replicas"] == 3
    assert plan(service("claim"), context()).deployments["prefill"]["spec"]["replicas"] == 0


def test_nothing_starts_before_its_model_is_there() -> None:
    made = plan(service("full"), context(commit=None))
    assert set(made.deployments) == {"router"}
    assert [item["metadata"]["name"] for item in made.objects if item["kind"] == "Job"] == ["qwen-download-b2789365"]


def test_another_revision_is_another_job() -> None:
    jobs = [
        [item["metadata"]["name"] for item in plan(found, context()).objects if item["kind"] == "Job"]
        for found in (service("full"), changed("full", model__revision="v2"))
    ]
    assert jobs[0] != jobs[1]


def test_monitors_only_where_their_api_exists() -> None:
    kinds = {item["kind"] for item in plan(service("fable"), context(monitors=frozenset())).objects}
    assert kinds.isdisjoint({"PodMonitor", "ServiceMonitor"})


def gpu(found: LLMService, role: str) -> dict[str, Any]:
    pod = plan(found, context()).deployments[role]["spec"]["template"]["spec"]
    limits: dict[str, Any] = pod["containers"][0].get("resources", {}).get("limits", {})
    return limits


def test_gpus() -> None:
    assert "nvidia.com/gpu" not in gpu(service("fable"), "decode")
    assert gpu(service("hub"), "decode")["nvidia.com/gpu"] == "1"
    assert gpu(service("full"), "prefill")["nvidia.com/gpu"] == "2"
    without = {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"nvidia.com/gpu": None}}}]}}
    assert "nvidia.com/gpu" not in gpu(changed("hub", decode__podTemplate=without), "decode")


@pytest.mark.parametrize(
    ("change", "alters"),
    [
        ({"model__revision": "v2"}, True),
        ({"model__uri": "hf://a/b"}, True),
        ({"model__dtype": "float16"}, True),
        ({"slo__ttft": "1s"}, False),
        ({"decode__kvCacheMemory": "1Gi"}, False),
        ({"decode__replicas": 7}, False),
        ({"model__maxContextTokens": 4096}, False),
    ],
)
def test_the_fingerprint_follows_what_makes_kv_interchangeable(change: dict[str, Any], alters: bool) -> None:
    hashes = {fingerprint_hash(found, context()) for found in (service("full"), changed("full", **change))}
    assert (len(hashes) == 2) is alters


def test_a_change_of_configuration_restarts_only_whom_it_concerns() -> None:
    before, after = (
        plan(found, context()).deployments for found in (service("fable"), changed("fable", slo__tpot="1s"))
    )
    assert {role for role in before if before[role] != after[role]} == {"router"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"transfer__encryption": "Full"}, "spec.transfer.secretRef"),
        ({"transfer__channel": "NCCL"}, "spec.transfer.channel"),
        ({"router__tls": {"secretName": "x"}}, "spec.router.tls"),
    ],
)
def test_what_this_version_cannot_do_is_named(change: dict[str, Any], field: str) -> None:
    assert unsupported(service("fable")) is None
    assert (unsupported(changed("fable", **change)) or "").startswith(field)


def test_a_rendering_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"status\.runtime\.rendering: expected 1, got 2"):
        plan(service("fable"), context(runtime=RUNTIME.model_copy(update={"rendering": 2})))


def config_of(made: Plan, role: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(made.config[role])
    return found


def test_ranks_are_told_to_the_worker_and_asked_for_as_gpus() -> None:
    made = plan(changed("full", decode__resources={}, decode__tensorParallel=4), context())
    for role, degree in (("prefill", 2), ("decode", 4)):
        container = made.deployments[role]["spec"]["template"]["spec"]["containers"][0]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(degree)
        assert config_of(made, role)["tensor_parallel"] == degree
    assert "tensor_parallel" not in config_of(plan(service("fable"), context()), "prefill")


def test_an_encrypted_service_mounts_its_keys_and_is_probed_in_the_clear() -> None:
    wanted = service("encrypted")
    assert unsupported(wanted) is None
    made = plan(wanted, context())
    assert config_of(made, "router")["worker_tls_dir"] == "/etc/lanewise-secret"
    for role in ("prefill", "decode"):
        found, (container,) = config_of(made, role), made.deployments[role]["spec"]["template"]["spec"]["containers"]
        assert (found["encryption"], found["secret_dir"]) == ("Authenticated", "/etc/lanewise-secret")
        assert found["health_listen"] == "0.0.0.0:50062"
        probes = [container[f"{name}Probe"]["grpc"]["port"] for name in ("startup", "liveness", "readiness")]
        assert probes == [50062] * 3
        assert {"mountPath": "/etc/lanewise-secret", "name": "transfer-keys", "readOnly": True} in container[
            "volumeMounts"
        ]
    assert config_of(made, "decode")["kv_data_listen"] == "tcp://0.0.0.0:50072"
    secrets = {role: keys_of(made, role) for role in made.deployments}
    assert {role: keys["secretName"] for role, keys in secrets.items()} == dict.fromkeys(secrets, "sealed-keys")
    assert [item["key"] for item in secrets["router"]["items"]] == ["ca.crt", "tls.crt", "tls.key"], "no KV keys"


@pytest.mark.parametrize(
    ("transfer", "opened"),
    [
        ({}, True),
        ({"channel": "ZeroMQ"}, False),
        ({"encryption": "Authenticated", "secretRef": {"name": "keys"}}, True),
        ({"encryption": "Full", "secretRef": {"name": "keys"}}, False),
    ],
)
def test_data_has_a_port_of_its_own_where_it_does_not_travel_with_control(
    transfer: dict[str, Any], opened: bool
) -> None:
    made = plan(changed("fable", transfer=transfer), context())
    assert ("kv_data_listen" in config_of(made, "decode")) is opened
    assert config_of(made, "decode").get("kv_channel") == transfer.get("channel")
    (container,) = made.deployments["decode"]["spec"]["template"]["spec"]["containers"]
    assert ("kv-data" in [port["name"] for port in container["ports"]]) is opened
    policies = [item for item in made.objects if item["kind"] == "NetworkPolicy"]
    ports = {port["port"] for item in policies for rule in item["spec"]["ingress"] for port in rule["ports"]}
    assert (50072 in ports) is opened


def keys_of(made: Plan, role: str) -> dict[str, Any]:
    volumes = made.deployments[role]["spec"]["template"]["spec"]["volumes"]
    found: dict[str, Any] = next(volume["secret"] for volume in volumes if volume["name"] == "transfer-keys")
    return found


def test_workers_that_speak_differently_have_different_fingerprints() -> None:
    plain = changed("encrypted", transfer={"encryption": "None"})
    sealed, full = service("encrypted"), changed("encrypted", transfer__encryption="Full")
    shorter = changed("encrypted", transfer={"encoding": "Int8"})
    assert len({fingerprint_hash(found, context()) for found in (plain, sealed, full, shorter)}) == 4
    for role in ("prefill", "decode"):
        assert config_of(plan(shorter, context()), role)["kv_encoding"] == "Int8"
        assert "kv_encoding" not in config_of(plan(plain, context()), role)
