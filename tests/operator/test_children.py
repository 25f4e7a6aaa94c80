"""Between plan and application: held roles, revisions, Jobs that cannot be changed, templates tried beforehand."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import yaml

from lanewise.operator.children import Children, first_refusal, in_template
from lanewise.operator.cluster import ApiError
from lanewise.operator.compare import stamped
from lanewise.operator.observed import Store
from lanewise.operator.plan import plan
from lanewise.operator.plan_types import PlanContext
from lanewise.spec import LLMService, builtin_service
from lanewise.spec_status import RuntimeStatus

KEY = ("n", "fable")
RUNTIME = RuntimeStatus(version="0.1.0", rendering=1, control_image="c", worker_image="w")
CONTEXT = PlanContext("n", "u", RUNTIME, "r")


def service(**spec: Any) -> LLMService:
    data = builtin_service().model_dump(by_alias=True, exclude_none=True, exclude={"status"})
    data["spec"].update(spec)
    return LLMService.model_validate(data)


class Kept:
    """A cluster that holds what was applied to it, and refuses Deployments with `refusal`."""

    def __init__(self, store: Store) -> None:
        self.store, self.objects = store, dict[tuple[str, str], dict[str, Any]]()
        self.deleted: list[str] = []
        self.refusal: ApiError | None = None
        self.tried = 0
        self.version = 0

    def keep(self, *manifests: Mapping[str, Any]) -> None:
        for manifest in manifests:
            self.version += 1
            body = deepcopy(stamped(manifest))
            body["metadata"] |= {"uid": f"u{self.version}", "resourceVersion": str(self.version)}
            self.objects[body["kind"], body["metadata"]["name"]] = body
            self.store.child(body, deleted=False)

    async def get(self, kind: str, namespace: str | None, name: str) -> dict[str, Any] | None:
        return self.objects.get((kind, name))

    async def apply(self, manifest: Mapping[str, Any], *, dry_run: bool) -> dict[str, Any]:
        assert dry_run
        self.tried += 1
        if self.refusal is not None:
            raise self.refusal
        return dict(manifest)

    async def delete(self, kind: str, namespace: str | None, name: str, uid: str) -> None:
        self.deleted.append(f"{kind}/{name}")


def fresh() -> tuple[Kept, Children]:
    store = Store()
    cluster = Kept(store)
    return cluster, Children(cluster, store)  # type: ignore[arg-type]


def named(objects: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    (found,) = (item for item in objects if item["kind"] == kind and name in item["metadata"]["name"])
    return found


async def running(found: LLMService) -> tuple[Kept, Children]:
    """A cluster in which `found` has been applied."""
    cluster, children = fresh()
    cluster.keep(*await children.settle(KEY, found, plan(found, CONTEXT), frozenset()))
    return cluster, children


async def test_the_first_time_everything_goes_and_templates_are_kept() -> None:
    _, children = fresh()
    objects = await children.settle(KEY, service(), plan(service(), CONTEXT), frozenset())
    kinds = [item["kind"] for item in objects]
    assert kinds.count("Deployment") == 3
    assert kinds.count("ControllerRevision") == 2
    assert kinds.index("ControllerRevision") < kinds.index("Deployment"), "what is rolled out can be gone back to"


async def test_nothing_new_needs_no_new_revision() -> None:
    _, children = await running(service())
    kinds = [item["kind"] for item in await children.settle(KEY, service(), plan(service(), CONTEXT), frozenset())]
    assert "ControllerRevision" not in kinds


async def test_a_held_role_keeps_template_and_configuration_and_the_rest_moves() -> None:
    before = plan(service(), CONTEXT)
    _, children = await running(service())
    changed = service(model={"uri": "builtin://fable", "dtype": "float32"})
    after = plan(changed, CONTEXT)
    objects = await children.settle(KEY, changed, after, frozenset({"prefill"}))
    assert named(objects, "Deployment", "prefill") == before.deployments["prefill"]
    assert named(objects, "Deployment", "decode") == after.deployments["decode"]
    data = named(objects, "ConfigMap")["data"]
    assert data["prefill.yaml"] == before.config["prefill"]
    assert yaml.safe_load(data["decode.yaml"])["dtype"] == "float32"
    revisions = [item["metadata"]["name"] for item in objects if item["kind"] == "ControllerRevision"]
    assert [name.rpartition("-")[0] for name in revisions] == ["fable-decode"]


async def test_workers_go_on_while_another_model_is_downloaded() -> None:
    before = plan(service(), CONTEXT)
    _, children = await running(service())
    waiting = service(model={"uri": "hf://a/b", "servedName": "fable", "cache": {"claim": "c"}})
    objects = await children.settle(KEY, waiting, plan(waiting, CONTEXT), frozenset())
    for role in ("prefill", "decode"):
        assert named(objects, "Deployment", role) == before.deployments[role]
    assert named(objects, "ConfigMap")["data"]["decode.yaml"] == before.config["decode"]
    assert named(objects, "Job")


async def test_a_job_is_made_once_and_again_only_when_it_has_to_differ() -> None:
    found = service(model={"uri": "hf://a/b", "cache": {"claim": "c"}})
    made = plan(found, CONTEXT)
    cluster, children = fresh()
    job = named(list(made.objects), "Job")
    cluster.keep(job)
    assert "Job" not in [item["kind"] for item in await children.settle(KEY, found, made, frozenset())]
    assert cluster.deleted == []
    cluster.keep({**job, "spec": {**job["spec"], "backoffLimit": 1}})
    await children.settle(KEY, found, made, frozenset())
    assert cluster.deleted == [f"Job/{job['metadata']['name']}"]


async def test_a_refused_template_is_named_and_quota_is_not_its_fault() -> None:
    found = service(decode={"replicas": 1, "podTemplate": {"spec": {"priorityClassName": "x"}}})
    made = plan(found, CONTEXT)
    cluster, children = fresh()
    cluster.refusal = ApiError(422, "Invalid", "Deployment is invalid: spec.template.spec.x: no")
    refusals = await children.check_templates(KEY, found, made.objects)
    assert first_refusal(refusals) == (
        "PodTemplateInvalid",
        "Deployment is invalid: spec.decode.podTemplate.spec.x: no",
    )
    assert cluster.tried == 1, "only what has a podTemplate is tried"
    cluster.refusal = ApiError(403, "Forbidden", "exceeded quota: q")
    assert await children.check_templates(KEY, found, made.objects) == ()
    cluster.keep(*made.deployments.values())
    assert await children.check_templates(KEY, found, made.objects) == ()
    assert cluster.tried == 2, "and only when it is about to change"


def test_paths_are_as_the_user_wrote_them() -> None:
    assert in_template("router", "x: .spec.template.spec.a: no") == "x: .spec.router.podTemplate.spec.a: no"
    assert first_refusal(()) is None
