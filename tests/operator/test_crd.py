"""The custom resource definitions: what pydantic holds a resource to, the schema says too; the chart has what is made.

What the API server makes of them is tested in tests/cluster/test_resources.py with the same tables.
"""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from lanewise.cli import main
from lanewise.operator import crd
from lanewise.operator.crd import KINDS, definitions, walk
from lanewise.spec_model import Model
from lanewise.spec_types import _Written
from lanewise.spec_yaml import SpecError, parse_resources
from tests.cluster import rules

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "deploy" / "helm" / "lanewise" / "templates" / "crds"
RELEASED = sorted((ROOT / "tests" / "cluster" / "released").glob("*.yaml"))


def schema_of(definition: dict[str, Any]) -> dict[str, Any]:
    (version,) = definition["spec"]["versions"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return found


SCHEMAS = {definition["spec"]["names"]["kind"]: schema_of(definition) for definition in definitions()}


# ---------------------------------------------------------------- the chart and the command


def test_the_charts_definitions_are_not_stale(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["crds", "--check", str(TEMPLATES)])
    assert status == 0, capsys.readouterr().err


def test_check_names_what_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crds", "--write", str(tmp_path)]) == 0
    assert main(["crds", "--check", str(tmp_path)]) == 0
    path = tmp_path / "llmservices.yaml"
    path.write_text(path.read_text().replace("maxLength: 40", "maxLength: 41"))
    (tmp_path / "more.yaml").write_text("")
    assert main(["crds", "--check", str(tmp_path)]) == 1
    assert "stale: llmservices.yaml, more.yaml; run `lanewise crds --write" in capsys.readouterr().err


def test_yaml_and_json_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crds"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert main(["crds", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == documents == json.loads(json.dumps(definitions()))


def test_the_page_of_fields_is_not_stale() -> None:
    found = importlib.util.spec_from_file_location("crd_page", ROOT / "tools" / "crd_page.py")
    assert found is not None
    assert found.loader is not None
    tool = importlib.util.module_from_spec(found)
    found.loader.exec_module(tool)
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.page(text) == text, "run python tools/crd_page.py"


def test_they_are_small() -> None:
    assert sum(len(text) for text in crd.templates().values()) < crd.MAX_TOTAL_BYTES


# ---------------------------------------------------------------- what pydantic says, the schema says


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plural)
def test_every_constraint_is_in_the_schema(kind: crd.Kind) -> None:
    checked = Counter[str]()
    compare(kind.model, SCHEMAS[kind.model.__name__], kind.model.__name__, checked)
    assert checked["constraints"] > 20
    assert checked["rules"] > 5


def compare(model: type[BaseModel], schema: dict[str, Any], path: str, checked: Counter[str]) -> None:
    """Each field of the model against its place in the schema, all the way down."""
    decorators = model.__pydantic_decorators__
    assert not decorators.field_validators, f"{path}: a validator that the API server does not know; declare a Rule"
    assert set(decorators.model_validators) <= {"_check_rules"}, path
    has_rules(model, schema, path, checked)
    for name, field in model.model_fields.items():
        if model in rules.ROOTS and name in rules.SET_BY_THE_API_SERVER:
            continue
        alias = field.alias or name
        here = schema["properties"][alias]
        for keyword, value in rules.constraints(field):
            checked["constraints"] += 1
            if keyword == "required":
                assert alias in schema["required"], f"{path}.{alias}"
            else:
                found = here.get(keyword)
                assert (tuple(found) if isinstance(found, list) else found) == value, f"{path}.{alias}: {keyword}"
        if not field.is_required() and field.get_default(call_default_factory=True) is not None:
            assert "default" in here, f"{path}.{alias}: pydantic has a default, the API server none"
        for inner in rules.models_in(field.annotation):
            deeper = here.get("items", here)
            assert deeper.get("additionalProperties") is None
            assert "x-kubernetes-preserve-unknown-fields" not in deeper, f"{path}.{alias}: unknown fields would pass"
            compare(inner, deeper, f"{path}.{alias}", checked)
        for scalar in scalars_in(field.annotation):
            written(scalar, here.get("additionalProperties", here), f"{path}.{alias}")


def has_rules(model: type[BaseModel], schema: dict[str, Any], path: str, checked: Counter[str]) -> None:
    said = [entry["rule"] for entry in schema.get("x-kubernetes-validations", ())]
    declared = list(model.rules) if issubclass(model, Model) else []
    assert said == [rule.cel for rule in declared if rule.cel], path
    for rule in declared:
        checked["rules"] += 1
        if not rule.cel:  # the schema has to say it by itself
            listed = schema["properties"][rule.field]
            assert listed["x-kubernetes-list-type"] == "map", f"{path}: {rule.field}"
            assert listed["x-kubernetes-list-map-keys"], path


def scalars_in(annotation: Any) -> list[type[_Written]]:
    parts = getattr(annotation, "__args__", ())
    found = [annotation] if isinstance(annotation, type) and issubclass(annotation, _Written) else []
    return found + [inner for part in parts for inner in scalars_in(part)]


def written(scalar: type[_Written], schema: dict[str, Any], path: str) -> None:
    assert schema["pattern"] == f"^{scalar.pattern}$", path
    assert schema["maxLength"] == 32, path
    assert schema.get("maximum") == scalar.max_int, path
    assert [entry["rule"] for entry in schema.get("x-kubernetes-validations", ())] == [
        rule[0] for rule in (scalar.rule,) if rule
    ], path
    overridden = any("sound" in vars(cls) for cls in scalar.__mro__ if cls is not _Written)
    assert overridden == (scalar.rule is not None), f"{scalar.__name__}: `sound` and `rule` belong together"


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize("kind", SCHEMAS)
def test_schemas_are_structural_and_explain_themselves(kind: str) -> None:
    for path, node in walk(SCHEMAS[kind]):
        assert node.get("type") != "number", f"{path}: no floats"
        assert "$ref" not in node, path
        assert ("anyOf" in node) == bool(node.get("x-kubernetes-int-or-string")), path
        if path.endswith("replicas"):
            assert "default" not in node, f"{path}: an omitted count belongs to an autoscaler"
        own = path.startswith("spec.") and not path.endswith(("[]", ".*"))
        assert not own or node.get("description"), f"{path}: `kubectl explain` has nothing to say"
        for entry in node.get("x-kubernetes-validations", ()):
            assert entry["message"], path
            if field := entry.get("fieldPath", "").partition("[")[0]:
                assert_there(node, field.strip("."), path)


def assert_there(node: dict[str, Any], field: str, path: str) -> None:
    for part in field.split("."):
        assert part in node["properties"], f"{path}: a rule names {field}, which is not there"
        node = node["properties"][part]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_lists_and_maps_are_bounded(kind: str) -> None:
    """The API server refuses rules that could cost too much, and reckons with the longest that a schema allows."""
    for path, node in walk(SCHEMAS[kind]):
        if node.get("type") == "array":
            assert node.get("maxItems"), path
        if node.get("type") == "object" and "additionalProperties" in node:
            assert node.get("maxProperties"), path


def test_names_and_columns() -> None:
    service, policy = definitions()
    assert service["spec"]["names"]["shortNames"] == ["llm", "llmsvc"]
    assert service["spec"]["names"]["categories"] == policy["spec"]["names"]["categories"] == ["all", "lanewise"]
    for definition in (service, policy):
        (version,) = definition["spec"]["versions"]
        assert version["subresources"] == {"status": {}}, "no scale subresource: there are two roles"
    columns = service["spec"]["versions"][0]["additionalPrinterColumns"]
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert ["Name", *shown] == ["Name", "Ready", "P", "D", "Router", "Reason", "URL", "Age"]


# ---------------------------------------------------------------- the tables of tests/cluster/resources


def test_the_invalid_resources_break_every_rule_once() -> None:
    known, broken = rules.all_rules(), Counter[str]()
    for row in rules.invalid():
        found = [name for name in known if name == row.rule or (": " in row.rule and name.startswith(row.rule))]
        assert len(found) == 1, f"{row.rule}: no such rule, or several: {found}"
        broken[found[0]] += 1
    assert sorted(known - set(broken)) == [], "rules without an invalid resource"
    assert {name: count for name, count in broken.items() if count > 1} == {}
    assert len(broken) >= 60


SEEN_BY_ONE_FILE = [row for row in rules.invalid() if row.old is None and not row.text]


@pytest.mark.parametrize("row", SEEN_BY_ONE_FILE, ids=lambda row: row.rule)
def test_python_refuses_the_same_field(row: rules.Invalid) -> None:
    with pytest.raises(SpecError) as caught:
        parse_resources(json.dumps(row.body))
    wanted = row.field.replace("[nvidia.com/gpu]", ".nvidia.com/gpu")
    assert any(problem.field.startswith(wanted) for problem in caught.value.problems), caught.value


def test_there_are_enough_sound_resources() -> None:
    found = rules.valid()
    assert len(found) >= 20
    for body in found:
        parse_resources(json.dumps(body))


# ---------------------------------------------------------------- within v1alpha1 schemas only grow


@pytest.mark.parametrize("released", RELEASED, ids=lambda path: path.stem)
def test_what_a_released_definition_took_this_one_takes(released: Path) -> None:
    for definition in yaml.safe_load_all(released.read_text()):
        old = schema_of(definition)
        new = SCHEMAS[definition["spec"]["names"]["kind"]]
        places = dict(walk(new))
        for path, node in walk(old):
            assert path in places, f"{path} was there in {released.stem}"
            assert narrower(node, places[path]) == [], f"{path}: narrower than in {released.stem}"
        known = {entry["rule"] for _, node in walk(old) for entry in node.get("x-kubernetes-validations", ())}
        fresh = {entry["rule"] for _, node in walk(new) for entry in node.get("x-kubernetes-validations", ())} - known
        assert fresh <= set(RULES_OF_NEW_FIELDS), f"rules that stored resources may break: {sorted(fresh - known)}"


RULES_OF_NEW_FIELDS: frozenset[str] = frozenset()
"""CEL of rules that only resources with a field that no release had could break."""


def narrower(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What the new schema refuses and the old one did not."""
    found = [key for key in ("type", "pattern", "x-kubernetes-int-or-string") if old.get(key) != new.get(key)]
    for key, sign in (("minimum", 1), ("maximum", -1), ("maxLength", -1), ("maxItems", -1), ("maxProperties", -1)):
        if key in new and (key not in old or sign * new[key] > sign * old[key]):
            found.append(key)
    if not set(old.get("enum", ())) <= set(new.get("enum", old.get("enum", ()))):
        found.append("enum")
    if not set(new.get("required", ())) <= set(old.get("required", ())):
        found.append("required")
    if old.get("default") != new.get("default") and "default" in old:
        found.append("default")
    return found
