"""The rules of the resources, said by a real API server: no webhook, strict field validation, no operator needed.

127 resources that break one rule each, together all of them; sound ones that come back as they went in; older and newer
definitions over the same stored objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lanewise.operator.crd import definitions
from lanewise.spec_yaml import KINDS, SpecError, parse_resources
from tests.cluster import rules
from tests.cluster.guesses import Guesser
from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.tools import wait_for
from tests.cluster.raw_api import DEFINITIONS, RawApi, place
from tests.cluster.rules import Invalid

SAMPLES = Path(__file__).parents[2] / "deploy" / "samples"
RELEASED = sorted((Path(__file__).parent / "released").glob("*.yaml"))
STRICT = "?fieldValidation=Strict"
DRY = f"{STRICT}&dryRun=All"
GUESSES = 400


@pytest.fixture(scope="module")
def nobody_writes(cluster: Cluster) -> Iterator[None]:
    """An operator that other tests have installed rests: its status would come between what is written and read."""
    found = cluster.items("deployments", "lanewise", "app.kubernetes.io/component=operator")
    counts = {item["metadata"]["name"]: item["spec"]["replicas"] for item in found}
    for name in counts:
        cluster.kubectl("scale", "deployment", name, "-n", "lanewise", "--replicas=0")
    wait_for(lambda: not cluster.items("pods", "lanewise", "app.kubernetes.io/component=operator"), "no operator", 60)
    yield
    for name, count in counts.items():
        cluster.kubectl("scale", "deployment", name, "-n", "lanewise", f"--replicas={count}")
        cluster.kubectl("rollout", "status", "deployment", name, "-n", "lanewise", "--timeout=120s")


@pytest.fixture(scope="module")
def api(cluster: Cluster, nobody_writes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawApi]:
    """The API server with our definitions."""
    with RawApi(cluster.kubeconfig, tmp_path_factory.mktemp("credentials")) as found:
        establish(found, definitions())
        yield found


def establish(api: RawApi, wanted: list[dict[str, Any]]) -> None:
    """Applies definitions and returns when the API server serves what they say."""
    for definition in wanted:
        answer = api.apply_definition(definition)
        assert answer.code in (200, 201), answer.message
        name, generation = definition["metadata"]["name"], answer.body["metadata"]["generation"]

        def served(name: str = name, generation: int = generation) -> bool:
            found = api.call("GET", f"{DEFINITIONS}/{name}").body
            conditions = {item["type"]: item["status"] for item in (found.get("status", {}).get("conditions") or ())}
            return found["metadata"]["generation"] == generation and conditions.get("Established") == "True"

        wait_for(served, f"{name} to be served", 30)
    for kind in KINDS:
        wait_for(lambda kind=kind: api.call("GET", place(kind, "default")).code == 200, f"the API to list {kind}", 30)  # type: ignore[misc]


@pytest.mark.parametrize("row", rules.invalid(), ids=lambda row: row.rule)
def test_the_api_server_refuses_and_names_the_field(api: RawApi, namespace_of_module: str, row: Invalid) -> None:
    name = row.body["metadata"]["name"]
    body: object = row.body
    if row.text:
        body = json.dumps(row.body).replace('"spec": {', '"spec": {' + row.text + ", ", 1)
    if row.old is None:
        answer = api.call("POST", place(row.kind, namespace_of_module) + DRY, body)
    else:
        made = api.call("POST", place(row.kind, namespace_of_module) + STRICT, row.old)
        assert made.code == 201, made.message
        whole = row.body | {"metadata": made.body["metadata"]}
        answer = api.call("PUT", place(row.kind, namespace_of_module, name) + DRY, whole)
        assert api.call("DELETE", place(row.kind, namespace_of_module, name)).code == 200
    assert answer.code in (400, 422), answer.body
    if answer.code == 400:  # strict decoding knows no causes
        assert f'{row.message} "{row.field}"' in answer.message
        return
    assert row.field in answer.message
    assert {field for field, _ in answer.causes} - {row.also} == {row.field}, answer.message
    assert any(row.message in message for field, message in answer.causes if field == row.field), answer.message


@pytest.fixture(scope="module")
def namespace_of_module(api: RawApi) -> Iterator[str]:
    name = "resources"
    made = api.call("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    assert made.code == 201, made.message
    yield name
    assert api.call("DELETE", f"/api/v1/namespaces/{name}").code == 200


def sound() -> list[dict[str, Any]]:
    """The table, and what we hand to users."""
    samples = [body for path in sorted(SAMPLES.glob("*.yaml")) for body in yaml.safe_load_all(path.read_text())]
    return rules.valid() + samples


@pytest.mark.parametrize("body", sound(), ids=lambda body: f"{body['kind']}-{body['metadata']['name']}")
def test_a_sound_resource_comes_back_unchanged(api: RawApi, namespace_of_module: str, body: dict[str, Any]) -> None:
    where = place(body["kind"], namespace_of_module)
    one = f"{where}/{body['metadata']['name']}"
    made = api.call("POST", where + STRICT, body)
    assert made.code == 201, made.message
    try:
        found = api.call("GET", one).body
        assert without_defaults(body["spec"], found["spec"]) == body["spec"]
        # What the API server adds are the defaults that pydantic has, no more and no less.
        (ours,) = parse_resources(json.dumps(body))
        assert json.loads(json.dumps(found["spec"])) == written(ours)["spec"]
        # What was read can be written back, by a person or a GitOps tool, and is no change.
        again = api.call("PUT", one + STRICT, found)
        assert again.code == 200, again.message
        assert again.body["metadata"]["resourceVersion"] == found["metadata"]["resourceVersion"]
        (read,) = parse_resources(json.dumps(found))
        assert written(read)["spec"] == written(ours)["spec"]
    finally:
        assert api.call("DELETE", one).code == 200


def written(resource: Any) -> Any:
    return json.loads(resource.model_dump_json(by_alias=True, exclude_none=True))


def without_defaults(sent: Any, found: Any) -> Any:
    """`found` without the fields that were not sent."""
    if isinstance(sent, dict) and isinstance(found, dict):
        return {key: without_defaults(sent[key], value) for key, value in found.items() if key in sent}
    if isinstance(sent, list) and isinstance(found, list) and len(sent) == len(found):
        return [without_defaults(*pair) for pair in zip(sent, found, strict=True)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_api_server_and_python_judge_alike(api: RawApi, namespace_of_module: str, kind: str) -> None:
    """Resources made up at random: whatever one of them takes, the other takes."""
    (definition,) = (found for found in definitions() if found["spec"]["names"]["kind"] == kind)
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    verdicts = {True: 0, False: 0}
    for seed in range(GUESSES):
        body = rules.resource(kind, "guess", Guesser(seed).object(schema))
        answer = api.call("POST", place(kind, namespace_of_module) + DRY, body)
        assert answer.code in (201, 400, 422), answer.message
        try:
            parse_resources(json.dumps(body))
            ours, said = True, "sound"
        except SpecError as error:
            ours, said = False, str(error)
        assert ours == (answer.code == 201), f"{body['spec']}\npython: {said}\nAPI server: {answer.message or 'taken'}"
        verdicts[ours] += 1
    assert min(verdicts.values()) >= GUESSES // 20, f"too much alike to tell: {verdicts}"


def older() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Definitions of releases, and those of a release that knew less."""
    for path in RELEASED:
        yield path.stem, list(yaml.safe_load_all(path.read_text()))
    small = definitions()
    for definition, fields in zip(small, (("lanes", "drain", "transfer"), ("scaleToZero", "behavior")), strict=True):
        spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        for field in fields:
            del spec["properties"][field]
    yield "with fewer fields", small


@pytest.mark.parametrize("old", [item[1] for item in older()], ids=[item[0] for item in older()])
def test_an_older_definition_over_the_newer_one_and_back(
    api: RawApi, namespace_of_module: str, old: list[dict[str, Any]]
) -> None:
    """A chart is rolled back and upgraded again: every stored resource stays readable, and nothing of it is lost."""
    bodies = rules.valid()
    for body in bodies:
        made = api.call("POST", place(body["kind"], namespace_of_module) + STRICT, body)
        assert made.code == 201, made.message
    before = listed(api, namespace_of_module)
    try:
        establish(api, old)
        assert listed(api, namespace_of_module).keys() == before.keys()
        establish(api, definitions())
        wait_for(lambda: listed(api, namespace_of_module) == before, "all stored resources as they were", 30)
    finally:
        establish(api, definitions())
        for body in bodies:
            api.call("DELETE", place(body["kind"], namespace_of_module, body["metadata"]["name"]))


def listed(api: RawApi, namespace: str) -> dict[str, Any]:
    found = [item for kind in KINDS for item in api.call("GET", place(kind, namespace)).body["items"]]
    return {f"{item['kind']}/{item['metadata']['name']}": item["spec"] for item in found}
