"""Where the weights come from: the cache claim, the download Job, and the volume that workers mount.

Owns: one Job per (uri, revision), the claim the operator makes, model volumes. Must not: know how a download works.
"""

from __future__ import annotations

from typing import Any

from lanewise.operator import names
from lanewise.operator.plan_config import MODELS_DIR, short_hash
from lanewise.operator.plan_types import Manifest, PlanContext, child
from lanewise.operator.pod_template import merge_template
from lanewise.operator.security import CONTAINER_SECURITY, POD_SECURITY, scratch
from lanewise.spec import LLMService

HUB_DIR = "/tmp/hf"
JOB_SECONDS = 24 * 3600
JOB_RETRIES = 20
EXIT_HOPELESS = 2  # no such repository or revision, or no permission: another try would end the same


def needs_download(service: LLMService) -> bool:
    model = service.spec.model
    return model.uri.startswith("hf://") and model.cache is not None


def claim_name(service: LLMService) -> str | None:
    """The claim that holds the weights; None where they are in the image or on an emptyDir."""
    model = service.spec.model
    if model.uri.startswith("pvc://"):
        return model.uri.removeprefix("pvc://").partition("/")[0]
    if model.cache is None:
        return None
    return model.cache.claim or f"{service.metadata.name}-models"


def cache_claim(service: LLMService, context: PlanContext) -> Manifest | None:
    """The claim the operator makes. Unless deletePolicy is Delete nobody owns it, so it outlives the service."""
    cache = service.spec.model.cache
    if cache is None or cache.size is None:
        return None
    spec: dict[str, Any] = {
        "accessModes": [cache.access_mode or "ReadWriteOnce"],
        "resources": {"requests": {"storage": str(cache.size)}},
    }
    if cache.storage_class is not None:
        spec["storageClassName"] = cache.storage_class
    name = f"{service.metadata.name}-models"
    claim = child(service, context, "v1", "PersistentVolumeClaim", name, None, spec=spec)
    if cache.delete_policy == "Retain":
        claim["metadata"].pop("ownerReferences", None)
    return claim


def job_name(service: LLMService) -> str:
    model = service.spec.model
    return f"{service.metadata.name}-download-{short_hash([model.uri, model.revision])[:8]}"


def download_job(service: LLMService, context: PlanContext) -> Manifest:
    """Resolves the revision to a commit and downloads it into `<owner>--<name>/<sha>/` of the claim."""
    spec, model = service.spec, service.spec.model
    volume = {"name": "models", "persistentVolumeClaim": {"claimName": claim_name(service)}}
    command = ["python", "-m", "lanewise.engine.download", "--uri", model.uri, "--revision", model.revision]
    container: dict[str, Any] = {
        "name": "worker",
        "image": context.runtime.worker_image,
        "command": [*command, "--into", MODELS_DIR, "--progress", f"0.0.0.0:{names.PROGRESS_PORT}"],
        "env": [{"name": "HOME", "value": "/tmp"}, *hub_environment(service)],
        "ports": [{"name": "progress", "containerPort": names.PROGRESS_PORT, "protocol": "TCP"}],
        "volumeMounts": [{"name": "models", "mountPath": MODELS_DIR}, *scratch()[1]],
        "securityContext": CONTAINER_SECURITY,
    }
    if context.image_pull_policy:
        container["imagePullPolicy"] = context.image_pull_policy
    pod: dict[str, Any] = {
        "serviceAccountName": f"{service.metadata.name}-worker",
        "automountServiceAccountToken": False,
        "restartPolicy": "Never",
        "securityContext": POD_SECURITY,
        "containers": [container],
        "volumes": [volume, *scratch()[0]],
    }
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret.name} for secret in spec.image_pull_secrets]
    template = {"metadata": {"labels": names.labels(service.metadata.name, "download")}, "spec": pod}
    theirs = spec.decode.pod_template
    merged = merge_template(template, None if theirs is None else _without_resources(theirs.model_dump()))
    hopeless = {"containerName": "worker", "operator": "In", "values": [EXIT_HOPELESS]}
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    rules = [{"action": "FailJob", "onExitCodes": hopeless}, {"action": "Ignore", "onPodConditions": disrupted}]
    body = {
        "backoffLimit": JOB_RETRIES,
        "activeDeadlineSeconds": JOB_SECONDS,
        "podFailurePolicy": {"rules": rules},
        "template": merged,
    }
    return child(service, context, "batch/v1", "Job", job_name(service), "download", spec=body)


def hub_environment(service: LLMService) -> list[dict[str, Any]]:
    """Only where something is downloaded: the hub's folder, and the token from its Secret."""
    model = service.spec.model
    if not model.uri.startswith("hf://"):
        return []
    env: list[dict[str, Any]] = [{"name": "HF_HOME", "value": HUB_DIR}]
    if model.token_secret_ref is not None:
        secret = {"name": model.token_secret_ref.name, "key": model.token_secret_ref.key}
        env.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": secret}})
    return env


def _without_resources(template: dict[str, Any]) -> dict[str, Any]:
    """The decode pods' template for the download: their GPUs are not needed to copy files."""
    containers = template["spec"].get("containers")
    if not isinstance(containers, list):
        return template
    stripped = [
        {name: value for name, value in item.items() if name != "resources"} if isinstance(item, dict) else item
        for item in containers
    ]
    return {**template, "spec": {**template["spec"], "containers": stripped}}
