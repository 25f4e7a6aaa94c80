"""Between plan and application: what is held back, which templates are kept, and whether pods could be made at all.

Owns: ControllerRevisions, held roles, Jobs (which cannot be changed), dry runs of pod templates.
Must not: decide the order of a rollout (rollout.py) or write anything but what its methods say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lanewise.operator import names
from lanewise.operator.apply import Refusal
from lanewise.operator.cluster import ApiError, Cluster
from lanewise.operator.compare import applied_hash, differences
from lanewise.operator.model_state import job_finished
from lanewise.operator.names import APPLIED_HASH
from lanewise.operator.observed import Key, Known, Store
from lanewise.operator.plan_types import Manifest, Plan
from lanewise.operator.rollout import fingerprint, held, newest, of_role, revision_of, surplus
from lanewise.spec import LLMService


class Children:
    """The objects of one service after the other."""

    def __init__(self, cluster: Cluster, store: Store) -> None:
        self._cluster, self._store = cluster, store

    async def settle(self, key: Key, service: LLMService, wanted: Plan, hold: frozenset[str]) -> list[Manifest]:
        """The plan as it can be applied now: held roles as they were, revisions added, Jobs only where missing."""
        known = self._store.get(key)
        config, deployments = dict(wanted.config), dict(wanted.deployments)
        for role in names.WORKERS:
            live = known.child("Deployment", f"{key[1]}-{role}")
            waiting = role not in deployments  # for its model
            if live is None or not (waiting or role in hold):
                continue
            kept = await self._kept(known, key, role, fingerprint(live))
            if kept is None:
                deployments.pop(role, None)  # nothing is known of how it was: it stays as it is
                config[role] = _live_config(known, key, role) or config[role]
            else:
                deployments[role] = held(kept["deployment"], getattr(service.spec, role).replicas)
                config[role] = kept["config"]
        objects: list[Manifest] = []
        for item in wanted.objects:
            if item["kind"] == "ConfigMap":
                item = {**item, "data": {f"{role}.yaml": text for role, text in sorted(config.items())}}
            if item["kind"] == "Job" and not await self._needs_job(key, item):
                continue
            if item["kind"] != "Deployment":
                objects.append(item)
        objects += self._revisions(known, deployments, config)
        return objects + [deployments[role] for role in names.ROLES if role in deployments]

    def _revisions(self, known: Known, deployments: dict[str, Manifest], config: dict[str, str]) -> list[Manifest]:
        """New ControllerRevisions of the worker roles; known ones are data that cannot change."""
        found, made = known.of("ControllerRevision"), []
        for role in names.WORKERS:
            if role not in deployments:
                continue
            numbers = [int(item["revision"]) for item in of_role(found, role)]
            revision = revision_of(deployments[role], config[role], numbers)
            last = newest(found, role)
            if last is None or last["metadata"]["name"] != revision["metadata"]["name"]:
                made.append(revision)
        return made

    async def _kept(self, known: Known, key: Key, role: str, print_: str) -> dict[str, Any] | None:
        revision = newest(known.of("ControllerRevision"), role, print_)
        if revision is None:
            return None
        found = await self._cluster.get("ControllerRevision", key[0], revision["metadata"]["name"])
        return None if found is None else found.get("data")

    async def _needs_job(self, key: Key, job: Manifest) -> bool:
        """A Job's pods cannot be changed: one that is still wanted otherwise is deleted and made again."""
        live = self._store.get(key).child("Job", job["metadata"]["name"])
        if live is None:
            return True
        unchanged = live["metadata"].get("annotations", {}).get(APPLIED_HASH) == applied_hash(job)
        if not unchanged and job_finished(live) != "Complete":
            await self._cluster.delete("Job", key[0], live["metadata"]["name"], live["metadata"]["uid"])
        return False

    async def check_templates(self, key: Key, service: LLMService, objects: Iterable[Manifest]) -> tuple[Refusal, ...]:
        """Deployments with a podTemplate that are about to change are tried on the API server first, all of them:
        one that it would refuse must not leave the other roles half way."""
        refused = []
        for item in objects:
            if item["kind"] != "Deployment":
                continue
            role, name = item["metadata"]["labels"][names.COMPONENT_LABEL], item["metadata"]["name"]
            if getattr(service.spec, role).pod_template is None:
                continue
            if not differences(item, self._store.get(key).child("Deployment", name)):
                continue
            try:
                await self._cluster.apply(item, dry_run=True)
            except ApiError as error:
                if error.reason == "Forbidden":
                    continue  # quota or admission: no fault of the template, and the write itself will say so
                if not error.refused:
                    raise
                refused.append(Refusal("Deployment", name, "PodTemplateInvalid", in_template(role, error.message)))
        return tuple(refused)

    async def forget_old_revisions(self, key: Key) -> None:
        known = self._store.get(key)
        for role in names.WORKERS:
            for item in surplus(known.of("ControllerRevision"), role):
                metadata = item["metadata"]
                await self._cluster.delete("ControllerRevision", key[0], metadata["name"], metadata["uid"])
                known.children.pop(("ControllerRevision", metadata["name"]), None)


def in_template(role: str, message: str) -> str:
    """The API server's words about a Deployment, with the path as the user wrote it."""
    theirs = f"spec.{role}.podTemplate"
    return message.replace(".spec.template", f".{theirs}").replace(" spec.template", f" {theirs}")


def first_refusal(refusals: Sequence[Refusal]) -> tuple[str, str] | None:
    """(reason, message) of a Degraded condition; the API server's own text."""
    if not refusals:
        return None
    refusal = refusals[0]
    if refusal.reason == "PodTemplateInvalid":
        return refusal.reason, refusal.message
    reason = "QuotaExceeded" if "exceeded quota" in refusal.message else "Refused"
    return reason, str(refusal)


def _live_config(known: Known, key: Key, role: str) -> str | None:
    found = known.child("ConfigMap", f"{key[1]}-config")
    return None if found is None else found.get("data", {}).get(f"{role}.yaml")
