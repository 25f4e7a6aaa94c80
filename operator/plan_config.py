"""The configuration files of the processes, and the hash of what makes KV interchangeable.

Owns: how fields of the resource become fields of RouterConfig and WorkerConfig (config.py has their meaning).
Must not: build pods.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import yaml

from lanewise.operator import names
from lanewise.operator.plan_types import PlanContext
from lanewise.spec import LLMService
from lanewise.spec_types import Quantity

MODELS_DIR = "/models"
LONGEST_HOLD_S = 600.0
KEYS_DIR = "/etc/lanewise-keys"
SECRET_DIR = "/etc/lanewise-secret"


def render_config(service: LLMService, context: PlanContext, role: str) -> str:
    """The YAML file of one role."""
    fields = _router(service, context) if role == "router" else _worker(service, context, role)
    return yaml.safe_dump(fields, sort_keys=True, default_flow_style=False)


def fingerprint_hash(service: LLMService, context: PlanContext) -> str:
    """Changes exactly when workers of before and after may not exchange KV (as far as the resource can tell)."""
    model = service.spec.model
    fields: dict[str, str | None] = {
        "model": model_path(service, context),
        "commit": context.commit,
        "revision": model.revision,
        "dtype": model.dtype,
        "runtime": context.runtime.version,
        "image": context.runtime.worker_image,
    }
    if encrypted(service):  # workers that speak differently cannot exchange KV either: decode rolls first
        fields["encryption"] = service.spec.transfer.encryption
    if service.spec.transfer.encoding != "Native":
        fields["encoding"] = service.spec.transfer.encoding
    return short_hash(fields)


def encrypted(service: LLMService) -> bool:
    return service.spec.transfer.encryption != "None"


def has_data_port(service: LLMService) -> bool:
    """Whether data goes beside control: under MACs of its own or, where nothing is encrypted, by direct connections."""
    wanted = service.spec.transfer
    return wanted.encryption == "Authenticated" or (wanted.encryption == "None" and wanted.channel == "Auto")


def model_path(service: LLMService, context: PlanContext) -> str:
    """What workers load: a directory of a mounted claim, or the URI itself."""
    model = service.spec.model
    if model.uri.startswith("pvc://"):
        directory = model.uri.removeprefix("pvc://").partition("/")[2].strip("/")
        return f"file://{MODELS_DIR}/{directory}".rstrip("/")
    if model.uri.startswith("hf://") and model.cache is not None:
        owner_and_name = model.uri.removeprefix("hf://").replace("/", "--")
        return f"file://{MODELS_DIR}/{owner_and_name}/{context.commit or 'unresolved'}"
    return model.uri


def short_hash(value: object) -> str:
    """16 hex digits of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def _router(service: LLMService, context: PlanContext) -> dict[str, Any]:
    spec, name = service.spec, service.metadata.name
    fields = {
        "http": f"0.0.0.0:{names.HTTP_PORT}",
        "grpc": f"0.0.0.0:{names.GRPC_PORT}",
        "discovery": "kubernetes",
        "worker_services": [f"{context.namespace}/{name}-{role}" for role in names.WORKERS],
        "peer_routers": f"{context.namespace}/{name}-routers",
        "disaggregation": "Never" if spec.prefill.replicas == 0 else spec.disaggregation,
        "served_name": spec.model.name,
        "ttft_target_s": spec.slo.ttft.seconds,
        "tpot_target_s": spec.slo.tpot.seconds,
        "drain_max_s": spec.drain.max.seconds,
    }
    if spec.prefill.replicas is None and spec.decode.replicas is None:
        # Somebody else counts the workers, and may take them to zero: then requests wait as long as they can.
        fields["hold_timeout_s"] = LONGEST_HOLD_S
    if spec.lanes.short_max_tokens is not None:
        fields["short_max_tokens"] = spec.lanes.short_max_tokens
    if spec.router.auth is not None:
        fields["api_keys_file"] = f"{KEYS_DIR}/api-keys"
    if encrypted(service):
        fields["worker_tls_dir"] = SECRET_DIR
    return fields


def _worker(service: LLMService, context: PlanContext, role: str) -> dict[str, Any]:
    spec, model = service.spec, service.spec.model
    part = spec.prefill if role == "prefill" else spec.decode
    fields: dict[str, Any] = {
        "listen": f"0.0.0.0:{names.WORKER_PORT}",
        "metrics": f"0.0.0.0:{names.METRICS_PORT}",
        "model": model_path(service, context),
        "revision": context.commit or model.revision,
        "served_name": model.name,
        "dtype": model.dtype,
        "ttft_target_s": spec.slo.ttft.seconds,
        "drain_timeout_s": spec.drain.timeout.seconds,
        "drain_max_s": spec.drain.max.seconds,
    }
    if role == "decode":
        fields["kv_listen"] = f"tcp://0.0.0.0:{names.KV_PORT}"
        if has_data_port(service):
            fields["kv_data_listen"] = f"tcp://0.0.0.0:{names.KV_DATA_PORT}"
    if encrypted(service):
        fields |= {"encryption": spec.transfer.encryption, "secret_dir": SECRET_DIR}
        fields["health_listen"] = f"0.0.0.0:{names.HEALTH_PORT}"
    if spec.transfer.channel != "Auto":
        fields["kv_channel"] = spec.transfer.channel
    if spec.transfer.encoding != "Native":
        fields["kv_encoding"] = spec.transfer.encoding
    if model.max_context_tokens:
        fields["max_context_tokens"] = model.max_context_tokens
    if part.tensor_parallel > 1:
        fields["tensor_parallel"] = part.tensor_parallel
    if part.kv_cache_memory:
        fields["kv_cache_bytes"] = int(part.kv_cache_memory.value)
    cpu: Quantity | None = part.resources.limits.get("cpu") or part.resources.requests.get("cpu")
    if cpu is not None:
        # Without this a worker would start a thread per core of the node, far beyond its share.
        fields["threads"] = max(1, math.ceil(cpu.value))
    return fields
