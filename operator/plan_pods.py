"""The Deployments: one per role, under a name that never changes.

Owns: pods, probes, resources, drain times, spread, and where replicas are written. Must not: render configuration or
anything that is not a Deployment.
"""

from __future__ import annotations

import math
from typing import Any

from lanewise.operator import names
from lanewise.operator.plan_config import (
    KEYS_DIR,
    MODELS_DIR,
    SECRET_DIR,
    encrypted,
    fingerprint_hash,
    has_data_port,
    short_hash,
)
from lanewise.operator.plan_model import claim_name, hub_environment
from lanewise.operator.plan_types import Manifest, PlanContext, child
from lanewise.operator.pod_template import merge_template
from lanewise.operator.security import CONTAINER_SECURITY, POD_SECURITY, scratch
from lanewise.spec import LLMService
from lanewise.spec_roles import GPU_RESOURCE, DecodeRole, PrefillRole, RouterRole
from lanewise.spec_types import IntOrPercent

STARTUP_PERIOD_S = 2
READINESS_PERIOD_S = 2
LIVENESS_PERIOD_S = 10
LIVENESS_PATIENCE_S = 60  # a starved process is slow, not dead: a restart would end its streams
PRESTOP_S = 5  # endpoints of a pod that goes are still in use for a moment
GRACE_MARGIN_S = 30
PROGRESS_MARGIN_S = 60
PULL_S = 600  # of images, before the startup probe even begins
CONFIG_DIR = "/etc/lanewise"
WORKER_HEALTH = "lanewise.v1.Worker"
CERTIFICATES = ("ca.crt", "tls.crt", "tls.key")
SECRET_MODE = 0o440  # the group is the pod's (fsGroup)
ROUTER_STARTUP_S = 60
ROUTER_RESOURCES = {"requests": {"cpu": "100m", "memory": "256Mi"}}  # without any, a busy node would starve it first
HOSTNAME, ZONE = "kubernetes.io/hostname", "topology.kubernetes.io/zone"


def deployment(service: LLMService, context: PlanContext, role: str, config: str) -> Manifest:
    """The Deployment of `role`. Without replicas in the resource the field is left out: it is somebody else's."""
    part: RouterRole | PrefillRole | DecodeRole = getattr(service.spec, role)
    theirs = None if part.pod_template is None else part.pod_template.model_dump()
    template = _router_template(service, context) if role == "router" else _worker_template(service, context, role)
    template["metadata"]["annotations"][names.CONFIG_HASH] = short_hash(config)
    spec: dict[str, Any] = {
        "selector": {"matchLabels": names.selector(service.metadata.name, role)},
        "revisionHistoryLimit": 3,
        "progressDeadlineSeconds": math.ceil(service.spec.startup_timeout.seconds) + PULL_S + PROGRESS_MARGIN_S,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling(service, role)},
        "template": merge_template(template, theirs),
    }
    if part.replicas is not None:
        spec["replicas"] = part.replicas
    name = f"{service.metadata.name}-{role}"
    return child(service, context, "apps/v1", "Deployment", name, role, spec=spec)


def _rolling(service: LLMService, role: str) -> dict[str, Any]:
    if role == "router":
        return {"maxSurge": 1, "maxUnavailable": 0}
    rollout = service.spec.rollout
    return {"maxSurge": _count(rollout.max_surge), "maxUnavailable": _count(rollout.max_unavailable)}


def _count(value: IntOrPercent) -> int | str:
    return int(value) if value.isdigit() else str(value)


def _router_template(service: LLMService, context: PlanContext) -> Manifest:
    volumes, mounts = _common_volumes(service, "router")
    auth = service.spec.router.auth
    if auth is not None:
        keys = auth.api_keys_secret_ref
        items = [{"key": keys.key, "path": "api-keys"}]
        volumes.append({"name": "api-keys", "secret": {"secretName": keys.name, "items": items}})
        mounts.append({"name": "api-keys", "mountPath": KEYS_DIR, "readOnly": True})
    http = {"scheme": "HTTP", "port": names.HTTP_PORT}
    container = _container(service, context, "router", mounts) | {
        "env": _environment("router"),
        "ports": [_port("http", names.HTTP_PORT), _port("grpc", names.GRPC_PORT)],
        "startupProbe": _probe(STARTUP_PERIOD_S, ROUTER_STARTUP_S, httpGet={**http, "path": "/healthz"}),
        "livenessProbe": _probe(LIVENESS_PERIOD_S, LIVENESS_PATIENCE_S, httpGet={**http, "path": "/healthz"}),
        "readinessProbe": _probe(READINESS_PERIOD_S, 4, httpGet={**http, "path": "/readyz"}),
    }
    return _pod(service, "router", [container], volumes) | {
        "metadata": {"labels": names.labels(service.metadata.name, "router"), "annotations": {}}
    }


def _worker_template(service: LLMService, context: PlanContext, role: str) -> Manifest:
    part: PrefillRole | DecodeRole = getattr(service.spec, role)
    volumes, mounts = _common_volumes(service, role)
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{part.tensor_parallel}Gi"}})
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    claim = claim_name(service)
    if claim is not None:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "models", "mountPath": MODELS_DIR, "readOnly": True})
    ports = [_port("grpc", names.WORKER_PORT), _port("metrics", names.METRICS_PORT)]
    if role == "decode":
        ports.append(_port("kv", names.KV_PORT))
        if has_data_port(service):
            ports.append(_port("kv-data", names.KV_DATA_PORT))
    probed = names.HEALTH_PORT if encrypted(service) else names.WORKER_PORT
    if encrypted(service):
        ports.append(_port("health", names.HEALTH_PORT))
    alive, ready = {"port": probed, "service": ""}, {"port": probed, "service": WORKER_HEALTH}
    container = _container(service, context, role, mounts) | {
        "env": [*_environment(role), *(hub_environment(service) if claim is None else [])],
        "ports": ports,
        # The overall health stays SERVING while a worker drains; only its readiness goes.
        "startupProbe": _probe(STARTUP_PERIOD_S, service.spec.startup_timeout.seconds, grpc=alive),
        "livenessProbe": _probe(LIVENESS_PERIOD_S, LIVENESS_PATIENCE_S, grpc=alive),
        "readinessProbe": _probe(READINESS_PERIOD_S, 4, grpc=ready),
    }
    resources = _worker_resources(service, part)
    if resources:
        container["resources"] = resources
    annotations = {names.FINGERPRINT: fingerprint_hash(service, context)}
    return _pod(service, role, [container], volumes) | {
        "metadata": {"labels": names.labels(service.metadata.name, role), "annotations": annotations}
    }


def _pod(service: LLMService, role: str, containers: list[Manifest], volumes: list[Manifest]) -> Manifest:
    name = service.metadata.name
    spec: dict[str, Any] = {
        "serviceAccountName": f"{name}-router" if role == "router" else f"{name}-worker",
        "automountServiceAccountToken": role == "router",
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": math.ceil(service.spec.drain.max.seconds) + GRACE_MARGIN_S,
        "securityContext": POD_SECURITY,
        "containers": containers,
        "volumes": volumes,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": names.selector(name, role)},
            }
            for key in (HOSTNAME, ZONE)
        ],
    }
    if service.spec.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret.name} for secret in service.spec.image_pull_secrets]
    return {"spec": spec}


def _container(service: LLMService, context: PlanContext, role: str, mounts: list[Manifest]) -> Manifest:
    runtime = context.runtime
    module = "router" if role == "router" else f"{role}_worker"
    container: dict[str, Any] = {
        "name": "router" if role == "router" else "worker",
        "image": runtime.control_image if role == "router" else runtime.worker_image,
        "command": ["python", "-m", f"lanewise.{module}"],
        "lifecycle": {"preStop": {"sleep": {"seconds": PRESTOP_S}}},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }
    if context.image_pull_policy:
        container["imagePullPolicy"] = context.image_pull_policy
    if role == "router":
        resources = service.spec.router.resources
        given = resources.limits or resources.requests
        container["resources"] = _dump(resources.limits, resources.requests) if given else ROUTER_RESOURCES
    return container


def _worker_resources(service: LLMService, part: PrefillRole | DecodeRole) -> dict[str, Any]:
    limits, requests = dict(part.resources.limits), dict(part.resources.requests)
    if GPU_RESOURCE not in limits and GPU_RESOURCE in requests:
        limits[GPU_RESOURCE] = requests[GPU_RESOURCE]  # Kubernetes wants both, and equal
    found = _dump(limits, requests)
    # The model inside the package runs on any CPU; every other one wants its GPUs unless the resource says otherwise.
    if GPU_RESOURCE not in limits and not service.spec.model.uri.startswith("builtin://"):
        found.setdefault("limits", {})[GPU_RESOURCE] = str(part.tensor_parallel)
    return found


def _dump(limits: dict[str, Any], requests: dict[str, Any]) -> dict[str, Any]:
    both = {"limits": limits, "requests": requests}
    return {side: {name: str(value) for name, value in values.items()} for side, values in both.items() if values}


def _common_volumes(service: LLMService, role: str) -> tuple[list[Manifest], list[Manifest]]:
    volumes, mounts = scratch()
    file = f"{role}.yaml"
    config = {"name": f"{service.metadata.name}-config", "items": [{"key": file, "path": file}]}
    volumes, mounts = (
        [{"name": "config", "configMap": config}, *volumes],
        [{"name": "config", "mountPath": CONFIG_DIR, "readOnly": True}, *mounts],
    )
    if encrypted(service):
        volumes.append({"name": "transfer-keys", "secret": _transfer_secret(service, role)})
        mounts.append({"name": "transfer-keys", "mountPath": SECRET_DIR, "readOnly": True})
    return volumes, mounts


def _transfer_secret(service: LLMService, role: str) -> dict[str, Any]:
    """The folder that `lanewise keys` makes; routers need the certificates alone and see nothing else of it."""
    reference = service.spec.transfer.secret_ref
    found: dict[str, Any] = {"secretName": "" if reference is None else reference.name, "defaultMode": SECRET_MODE}
    if role == "router":
        found["items"] = [{"key": name, "path": name} for name in CERTIFICATES]
    return found


def _environment(role: str) -> list[dict[str, Any]]:
    env: list[dict[str, Any]] = [
        {"name": "LANEWISE_CONFIG", "value": f"{CONFIG_DIR}/{role}.yaml"},
        {"name": "LANEWISE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "HOME", "value": "/tmp"},
    ]
    if role != "router":
        address = {"fieldRef": {"fieldPath": "status.podIP"}}
        env.append({"name": "LANEWISE_ADVERTISE_HOST", "valueFrom": address})
    return env


def _port(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "containerPort": number, "protocol": "TCP"}


def _probe(period_s: int, patience_s: float, **check: Any) -> dict[str, Any]:
    failures = max(1, math.ceil(patience_s / period_s))
    return {**check, "periodSeconds": period_s, "timeoutSeconds": 5, "failureThreshold": failures}
