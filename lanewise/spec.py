"""The LLMService resource (`lanewise.io/v1alpha1`): one model for `lanewise up`, the operator and the simulator.

Owns: fields, defaults, limits and the rules between fields. The CRD schema is generated from these classes, so every
type here is structural: no unions but int-or-string, no floats. Field names are camelCase in files.
Must not: read files (spec_yaml.py does), fill in replicas (an omitted count belongs to an autoscaler), touch a cluster.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from lanewise.spec_types import (
    MODEL_URI,
    REVISION,
    SECRET_KEY,
    SERVED_NAME,
    Duration,
    IntOrPercent,
    ObjectName,
    Quantity,
    ServiceName,
    shown,
)

API_VERSION = "lanewise.io/v1alpha1"
GPU_RESOURCE = "nvidia.com/gpu"

Problem = tuple[tuple[str | int, ...] | str, str]
"""A field of the model at hand (dotted, or its parts where a part has dots itself) and what is wrong with it."""


class Model(BaseModel):
    """Base of every object: unknown fields and silent conversions are errors; rules are listed, not raised singly."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, alias_generator=to_camel)

    def problems(self) -> Iterable[Problem]:
        """Rules between the fields of this object."""
        return ()

    @model_validator(mode="after")
    def _check_rules(self) -> Model:
        found = list(self.problems())
        if found:
            parts = ((field,) if isinstance(field, str) else field for field, _ in found)
            text = "; ".join(
                f"{'.'.join(map(str, part))}: {what}" for part, (_, what) in zip(parts, found, strict=True)
            )
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": found})
        return self


class Metadata(BaseModel):
    """Kubernetes' own object; only the name has rules of ours (it is a prefix of pod names)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: ServiceName
    namespace: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class SecretRef(Model):
    name: ObjectName


class SecretKeyRef(Model):
    name: ObjectName
    key: str = Field(default="token", pattern=SECRET_KEY, max_length=253)


class ApiKeysRef(Model):
    name: ObjectName
    key: str = Field(default="api-keys", pattern=SECRET_KEY, max_length=253, description="one API key per line")


class Runtime(Model):
    version: str | None = Field(default=None, max_length=128, description="pins image and rendering of the pods")


class Cache(Model):
    """Where downloaded weights live: a claim of the user's, or one the operator makes (and never deletes by itself)."""

    claim: ObjectName | None = None
    size: Quantity | None = None
    storage_class: ObjectName | None = None
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"] | None = None
    delete_policy: Literal["Retain", "Delete"] = "Retain"

    def problems(self) -> Iterable[Problem]:
        if self.claim is None and self.size is None:
            yield "", "expected claim (an existing one) or size (to make one)"
        if self.claim is not None:
            for name in ("size", "storage_class", "access_mode"):
                if getattr(self, name) is not None:
                    yield to_camel(name), "cannot be set together with claim"


class ModelSource(Model):
    """Which model, under which name."""

    uri: str = Field(pattern=MODEL_URI, max_length=512)
    revision: str = Field(default="main", pattern=REVISION, max_length=128)
    served_name: str | None = Field(
        default=None, pattern=SERVED_NAME, max_length=128, description="default: last part of uri"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_context_tokens: int | None = Field(default=None, ge=16, le=16_777_216)
    token_secret_ref: SecretKeyRef | None = None
    cache: Cache | None = None

    @property
    def name(self) -> str:
        """The name clients use."""
        return self.served_name or self.uri.rstrip("/").rpartition("/")[2]

    def problems(self) -> Iterable[Problem]:
        if not self.uri.startswith("hf://"):
            # The API server writes defaults out, so a field that is set says nothing; one with another value does.
            for field, default in (("cache", None), ("revision", "main"), ("token_secret_ref", None)):
                if getattr(self, field) != default:
                    yield to_camel(field), f"is for hf:// models, uri is {shown(self.uri)}"


class Slo(Model):
    ttft: Duration = Duration("400ms")
    tpot: Duration = Duration("50ms")

    def problems(self) -> Iterable[Problem]:
        for name in ("ttft", "tpot"):
            if getattr(self, name).seconds <= 0:
                yield name, "expected a duration above zero"


class Lanes(Model):
    boundary: Literal["Learned", "Fixed"] = "Learned"
    short_max_tokens: int | None = Field(default=None, ge=1, le=16_777_216)

    def problems(self) -> Iterable[Problem]:
        if self.boundary == "Fixed" and self.short_max_tokens is None:
            yield "shortMaxTokens", "required with boundary Fixed, such as 256"
        if self.boundary == "Learned" and self.short_max_tokens is not None:
            yield "shortMaxTokens", "cannot be set with boundary Learned; expected boundary: Fixed"


ResourceName = Annotated[str, Field(max_length=317)]


class Resources(Model):
    """Container resources, as in a pod."""

    limits: dict[ResourceName, Quantity] = Field(default_factory=dict, max_length=32)
    requests: dict[ResourceName, Quantity] = Field(default_factory=dict, max_length=32)

    def problems(self) -> Iterable[Problem]:
        for name, request in self.requests.items():
            limit = self.limits.get(name)
            if limit is not None and request.value > limit.value:
                yield ("requests", name), f"expected at most the limit {limit}, got {request}"


PodTemplate = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]


class _Role(Model):
    resources: Resources = Resources()
    pod_template: PodTemplate | None = Field(default=None, description="merged into the pods by a small keyed table")

    def problems(self) -> Iterable[Problem]:
        for key in sorted(set(self.pod_template or {}) - {"metadata", "spec"}):
            yield ("podTemplate", key), "unknown field, expected metadata or spec"


class _WorkerRole(_Role):
    tensor_parallel: int = Field(default=1, ge=1, le=8, description="GPUs per worker, in one pod")
    kv_cache_memory: Quantity | None = Field(default=None, description="KV pool size; omitted: from device memory")

    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        for side in ("limits", "requests"):
            gpus = getattr(self.resources, side).get(GPU_RESOURCE)
            if gpus is not None and gpus.value != self.tensor_parallel:
                yield (
                    f"resources.{side}.{GPU_RESOURCE}",
                    f"expected tensorParallel ({self.tensor_parallel}), got {gpus}",
                )


class PrefillRole(_WorkerRole):
    replicas: int | None = Field(
        default=None, ge=0, le=1000, description="0: combined, decode workers prefill themselves"
    )


class DecodeRole(_WorkerRole):
    replicas: int | None = Field(default=None, ge=1, le=1000, description="zero is a ScalingPolicy's to choose")


class RouterService(Model):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    annotations: dict[str, str] = Field(default_factory=dict, max_length=64)


class RouterAuth(Model):
    api_keys_secret_ref: ApiKeysRef


class RouterTls(Model):
    secret_name: ObjectName


class RouterRole(_Role):
    replicas: int | None = Field(default=None, ge=1, le=100)
    service: RouterService = RouterService()
    auth: RouterAuth | None = None
    tls: RouterTls | None = None


class Transfer(Model):
    channel: Literal["Auto", "ZeroMQ", "NCCL", "IPC"] = "Auto"
    encoding: Literal["Native"] = "Native"
    encryption: Literal["None", "Authenticated", "Full"] = "None"
    secret_ref: SecretRef | None = Field(default=None, description="omitted: the operator makes one per service")

    def problems(self) -> Iterable[Problem]:
        if self.encryption == "None" and self.secret_ref is not None:
            yield "secretRef", "nothing is encrypted with it; expected encryption Authenticated or Full"


class Rollout(Model):
    max_surge: IntOrPercent = IntOrPercent("0")
    max_unavailable: IntOrPercent = IntOrPercent("1")

    def problems(self) -> Iterable[Problem]:
        if self.max_surge.is_zero and self.max_unavailable.is_zero:
            yield "maxUnavailable", "expected more than 0 when maxSurge is 0, or no pod could ever be replaced"


class Drain(Model):
    timeout: Duration = Duration("60s")
    max: Duration = Duration("10m")

    def problems(self) -> Iterable[Problem]:
        if self.timeout.seconds > self.max.seconds:
            yield "timeout", f"expected at most max ({self.max}), got {self.timeout}"


class LLMServiceSpec(Model):
    paused: bool = False
    runtime: Runtime = Runtime()
    model: ModelSource
    slo: Slo = Slo()
    lanes: Lanes = Lanes()
    disaggregation: Literal["Auto", "Always", "Never"] = "Auto"
    prefill: PrefillRole = PrefillRole()
    decode: DecodeRole = DecodeRole()
    router: RouterRole = RouterRole()
    transfer: Transfer = Transfer()
    rollout: Rollout = Rollout()
    drain: Drain = Drain()
    startup_timeout: Duration = Duration("30m")
    image_pull_secrets: list[SecretRef] = Field(default_factory=list, max_length=16)

    def problems(self) -> Iterable[Problem]:
        if self.disaggregation == "Always" and self.prefill.replicas == 0:
            yield "prefill.replicas", "expected at least 1 with disaggregation Always, got 0"


class LLMService(Model):
    """One model served under one name."""

    api_version: Literal["lanewise.io/v1alpha1"]
    kind: Literal["LLMService"]
    metadata: Metadata
    spec: LLMServiceSpec
    status: dict[str, Any] | None = Field(default=None, description="written by the operator, ignored everywhere else")


def builtin_service() -> LLMService:
    """What `lanewise up` serves without a file: the model inside the package, one worker per role."""
    return LLMService.model_validate(
        {
            "apiVersion": API_VERSION,
            "kind": "LLMService",
            "metadata": {"name": "fable"},
            "spec": {
                "model": {"uri": "builtin://fable"},
                "disaggregation": "Always",
                "prefill": {"replicas": 1},
                "decode": {"replicas": 1},
            },
        }
    )
