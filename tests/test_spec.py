"""The resources and their errors: which field, which line, what was expected."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.errors import ConfigError
from lanewise.spec import LLMService, builtin_service
from lanewise.spec_scaling import ScalingPolicy
from lanewise.spec_types import Duration, IntOrPercent, Quantity
from lanewise.spec_yaml import SpecError, parse_resources, read_resources, read_service

SAMPLES = sorted((Path(__file__).parent.parent / "deploy" / "samples").glob("*.yaml"))
SERVICE = """\
apiVersion: lanewise.io/v1alpha1
kind: LLMService
metadata:
  name: chat
spec:
  model:
    uri: builtin://fable
"""


def problems(text: str) -> list[tuple[int, str, str]]:
    with pytest.raises(SpecError) as caught:
        parse_resources(text, "s.yaml")
    return [(problem.line, problem.field, problem.message) for problem in caught.value.problems]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_samples_are_sound(sample: Path) -> None:
    assert isinstance(read_service(sample), LLMService)


def test_defaults_leave_replicas_open() -> None:
    (service,) = parse_resources(SERVICE)
    assert isinstance(service, LLMService)
    spec = service.spec
    assert (spec.prefill.replicas, spec.decode.replicas, spec.router.replicas) == (None, None, None)
    assert (spec.slo.ttft.seconds, spec.slo.tpot.seconds, spec.drain.max.seconds) == (0.4, 0.05, 600)
    assert spec.model.name == "fable"
    assert builtin_service().spec.prefill.replicas == 1


CASES = [
    ("slo: {ttft: 0.4}", "spec.slo.ttft", "expected a duration such as 400ms, 30s, 10m or 1h, got 0.4"),
    ("slo: {ttft: 400}", "spec.slo.ttft", "expected a duration such as 400ms, 30s, 10m or 1h, got 400"),
    ("slo: {ttft: 0s}", "spec.slo.ttft", "expected a duration above zero"),
    ("sol: {}", "spec.sol", "unknown field, did you mean slo?"),
    ("model: {uri: builtin://fable, tokens: 3}", "spec.model.tokens", "unknown field, expected uri, revision"),
    ("model: {}", "spec.model.uri", "required field is missing"),
    ("model: {uri: qwen}", "spec.model.uri", "expected hf://owner/name, pvc://claim/dir, file:///dir or builtin"),
    ("model: {uri: builtin://fable, revision: v1}", "spec.model.revision", "is for hf:// models"),
    ("model: {uri: hf://a/b, revision: 123}", "spec.model.revision", "expected a string, got 123 (quote it)"),
    ("model: {uri: hf://a/b, cache: {}}", "spec.model.cache", "expected claim (an existing one) or size"),
    ("model: {uri: hf://a/b, cache: {claim: c, size: 1Gi}}", "spec.model.cache.size", "cannot be set together with"),
    (
        "model: {uri: hf://a/b, maxContextTokens: 1.5}",
        "spec.model.maxContextTokens",
        "expected a whole number, got 1.5",
    ),
    ("model: {uri: hf://a/b, servedName: a b}", "spec.model.servedName", "expected a model name such as"),
    ("lanes: {boundary: Fixed}", "spec.lanes.shortMaxTokens", "required with boundary Fixed"),
    ("lanes: {shortMaxTokens: 4}", "spec.lanes.shortMaxTokens", "cannot be set with boundary Learned"),
    ("disaggregation: always", "spec.disaggregation", "expected Auto, Always or Never, got always"),
    ("disaggregation: No", "spec.disaggregation", "expected Auto, Always or Never, got false"),
    ("decode: {replicas: 0}", "spec.decode.replicas", "expected at least 1, got 0"),
    ("decode: {replicas: '2'}", "spec.decode.replicas", "expected a whole number, got '2'"),
    ("decode: {replicas: true}", "spec.decode.replicas", "expected a whole number, got true"),
    ("decode: {tensorParallel: 16}", "spec.decode.tensorParallel", "expected at most 8, got 16"),
    ("decode: {kvCacheMemory: 1.5}", "spec.decode.kvCacheMemory", "expected a quantity"),
    (
        "decode: {tensorParallel: 2, resources: {limits: {nvidia.com/gpu: 1}}}",
        "spec.decode.resources.limits.nvidia.com/gpu",
        "expected tensorParallel (2) GPUs",
    ),
    (
        "decode: {resources: {limits: {example.com/x: 1}, requests: {example.com/x: 2}}}",
        "spec.decode.resources.requests.example.com/x",
        "expected at most the limit of the same name",
    ),
    ("decode: {podTemplate: {containers: []}}", "spec.decode.podTemplate.containers", "expected metadata or spec"),
    ("decode:", "spec.decode", "expected a mapping of fields, got nothing"),
    ("disaggregation: Always\n  prefill: {replicas: 0}", "spec.prefill.replicas", "with disaggregation Always, got 0"),
    ("transfer: {secretRef: {name: s}}", "spec.transfer.secretRef", "expected encryption Authenticated or Full"),
    ("rollout: {maxUnavailable: 0}", "spec.rollout.maxUnavailable", "expected more than 0 when maxSurge is 0"),
    ("rollout: {maxSurge: 101%}", "spec.rollout.maxSurge", "expected a count such as 1 or a percentage"),
    ("drain: {timeout: 20m}", "spec.drain.timeout", "expected at most max (10m), got 20m"),
    ("imagePullSecrets: [{name: a}, {nam: b}]", "spec.imagePullSecrets[1].nam", "did you mean name?"),
    (f"imagePullSecrets: {[{'name': 'a'}] * 17}", "spec.imagePullSecrets", "expected at most 16 entries, got 17"),
]


@pytest.mark.parametrize(("line", "field", "message"), CASES, ids=[case[0][:40] for case in CASES])
def test_each_problem_names_field_line_and_expectation(line: str, field: str, message: str) -> None:
    base = SERVICE if not line.startswith("model") else SERVICE.partition("  model")[0]
    found = problems(f"{base}  {line}\n")
    last = len(base.splitlines()) + 1 + line.count("\n")
    assert [(number, name) for number, name, text in found if message in text] == [(last, field)], found


def test_everything_wrong_is_listed_at_once() -> None:
    text = SERVICE.replace("name: chat", "name: " + "x" * 41) + "  slo:\n    ttft: 0.4\n    tpto: 50ms\n  lanes: 3\n"
    assert [(line, field) for line, field, _ in problems(text)] == [
        (4, "metadata.name"),
        (9, "spec.slo.ttft"),
        (10, "spec.slo.tpto"),
        (11, "spec.lanes"),
    ]


def test_message_of_the_whole_file() -> None:
    with pytest.raises(SpecError) as caught:
        parse_resources(SERVICE + "  slo: {ttft: 0.4}\n", "s.yaml")
    assert str(caught.value) == ("s.yaml:8: spec.slo.ttft: expected a duration such as 400ms, 30s, 10m or 1h, got 0.4")


def test_many_documents() -> None:
    secret = "apiVersion: v1\nkind: Secret\ndata: {a: b}\n"
    policy = (
        "apiVersion: lanewise.io/v1alpha1\nkind: ScalingPolicy\nmetadata: {name: p}\n"
        "spec: {targetRef: {name: chat}, prefill: {max: 2}, decode: {max: 2}}\n"
    )
    found = parse_resources("---\n".join(("", secret, SERVICE, policy, "")))
    assert [type(resource) for resource in found] == [LLMService, ScalingPolicy]
    bad = "---\n".join((SERVICE, policy.replace("prefill: {max: 2}", "prefill: {min: 3, max: 2}")))
    assert problems(bad) == [(12, "spec.prefill.min", "expected at most max (2), got 3")]


def test_scaling_rules() -> None:
    text = (
        "apiVersion: lanewise.io/v1alpha1\nkind: ScalingPolicy\nmetadata: {name: p}\nspec:\n"
        "  targetRef: {name: chat}\n  prefill: {max: 2}\n  decode: {min: 2, max: 2}\n  budget: {gpus: 2}\n"
        "  schedules:\n    - {cron: '0 8 * * *', duration: 1h, prefill: {min: 3}}\n"
    )
    assert problems(text) == [
        (8, "spec.budget.gpus", "expected at least prefill.min + decode.min, got 2"),
        (10, "spec.schedules[0].prefill.min", "expected prefill.min of at most spec.prefill.max (2)"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: [1\nb: 2\n", 2, "not valid YAML"),
        ("a: b: c\n", 1, "not valid YAML"),
        ("\x00", 1, "not valid YAML"),
        ("- 1\n", 1, "expected a mapping with apiVersion"),
        (
            "kind: LLMServce\napiVersion: lanewise.io/v1alpha1\n",
            1,
            "expected LLMService or ScalingPolicy, got 'LLMServce'",
        ),
        ("metadata: {}\n", 1, "expected LLMService, got nothing"),
        ("kind: LLMService\napiVersion: lanewise.io/v2\n", 2, "expected lanewise.io/v1alpha1, got 'lanewise.io/v2'"),
        (SERVICE + "  slo: {}\n  slo: {}\n", 9, "written twice, first on line 8"),
        (SERVICE + "  ? [a, b]\n  : 1\n", 8, "not valid YAML"),
    ],
)
def test_files_that_are_not_resources(text: str, line: int, message: str) -> None:
    assert any(number == line and message in words for number, _, words in problems(text)), problems(text)


def test_which_service(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("---\n".join((SERVICE, SERVICE.replace("chat", "other"))))
    with pytest.raises(SpecError, match="expected one LLMService, got 2: chat, other"):
        read_service(path)
    path.write_text("")
    with pytest.raises(SpecError, match="expected a document of kind LLMService"):
        read_service(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_service(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_service(tmp_path / "none.yaml")


def test_what_kubectl_prints_is_read_back() -> None:
    (service,) = parse_resources(SERVICE)
    body = json.loads(service.model_dump_json(by_alias=True, exclude_none=True))
    body["metadata"] |= {"uid": "u", "resourceVersion": "1", "managedFields": [{}], "creationTimestamp": "2026-01-01"}
    body["status"] = {"conditions": [{"type": "Ready"}]}
    (again,) = parse_resources(yaml.safe_dump(body))
    assert isinstance(again, LLMService)
    assert isinstance(service, LLMService)
    assert again.spec == service.spec


@pytest.mark.parametrize("model", [LLMService, ScalingPolicy])
def test_schemas_are_structural(model: type[LLMService] | type[ScalingPolicy]) -> None:
    """What a CRD may hold: no floats anywhere, no unions but null and int-or-string, no default for replicas."""

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            assert node.get("type") != "number"
            if "anyOf" in node and not node.get("x-kubernetes-int-or-string"):
                assert len([option for option in node["anyOf"] if option != {"type": "null"}]) == 1, node
            assert node.get("properties", {}).get("replicas", {}).get("default") is None
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    schema = copy.deepcopy(model.model_json_schema())
    walk(schema)
    assert "servedName" in str(schema) or model is ScalingPolicy


def test_values_in_base_units() -> None:
    assert [Duration(text).seconds for text in ("400ms", "1h30m", "10m", "0s")] == [0.4, 5400, 600, 0]
    assert [int(Quantity(text).value) for text in ("16Gi", "1k", "2", "500m")] == [16 << 30, 1000, 2, 0]
    assert IntOrPercent.parse(3) == "3"
    assert IntOrPercent("0%").is_zero


@contextlib.contextmanager
def _worded() -> Iterator[None]:
    """Whatever goes wrong is a SpecError with places, not another exception."""
    try:
        yield
    except SpecError as error:
        problems = error.problems
    else:
        return
    assert all(problem.field.startswith("spec.") and problem.line > 1 for problem in problems)


@settings(deadline=None)  # a busy machine is no failure
@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_any_value_in_any_place_is_a_worded_problem_or_fine(value: object) -> None:
    for field in ("slo", "replicas", "model", "imagePullSecrets", "drain"):
        body = yaml.safe_load(SERVICE)
        body["spec"][field] = value
        with _worded():
            parse_resources(yaml.safe_dump(body, allow_unicode=True))


def test_read_resources_of_json(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(yaml.safe_load(SERVICE)))
    assert len(read_resources(path)) == 1
