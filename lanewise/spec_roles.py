"""The three roles of a service: prefill, decode and router, and what their pods look like.

Owns: `spec.prefill`, `spec.decode` and `spec.router` of LLMService. Must not: fill in replicas (an omitted count
belongs to an autoscaler) or know how pods are rendered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lanewise.spec_model import EachRule, Model, Rule
from lanewise.spec_source import ApiKeysRef
from lanewise.spec_types import ObjectName, PositiveQuantity, Quantity, cel_quantity

GPU_RESOURCE = "nvidia.com/gpu"
RESOURCE_NAME_LENGTH = 317


def _over_limit(found: Resources) -> list[tuple[str]]:
    return [
        (name,)
        for name, request in found.requests.items()
        if (limit := found.limits.get(name)) is not None and request.value > limit.value
    ]


class Resources(Model):
    """Container resources, as in a pod."""

    limits: dict[str, Quantity] = Field(default={}, max_length=16, description="most a container gets")
    requests: dict[str, Quantity] = Field(default={}, max_length=16, description="what a node must have free")

    rules = (
        EachRule(
            "requests",
            "expected at most the limit of the same name",
            "self.requests.all(name, !(name in self.limits)"
            f" || {cel_quantity('self.requests[name]')}.compareTo({cel_quantity('self.limits[name]')}) <= 0)",
            _over_limit,
        ),
        *(
            EachRule(
                side,
                f"expected resource names of at most {RESOURCE_NAME_LENGTH} characters as keys",
                f"self.{side}.all(name, name.size() <= {RESOURCE_NAME_LENGTH})",
                lambda self, side=side: [(name,) for name in getattr(self, side) if len(name) > RESOURCE_NAME_LENGTH],  # type: ignore[misc]
            )
            for side in ("limits", "requests")
        ),
    )


FreeForm = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]


class PodTemplate(Model):
    """Merged into the pods by a small keyed table: containers, env, volumes, mounts, ports, tolerations."""

    metadata: FreeForm = Field(default={}, description="labels and annotations of the pods")
    spec: FreeForm = Field(default={}, description="fields of a pod's spec")


class _Role(Model):
    resources: Resources = Field(default=Resources(), description="of the role's container")
    pod_template: PodTemplate | None = Field(default=None, description="what else the role's pods should have")


def _gpus(side: str) -> Rule:
    quoted = f"self.resources.{side}['{GPU_RESOURCE}']"
    return Rule(
        f"resources.{side}[{GPU_RESOURCE}]",
        "expected tensorParallel ({self.tensor_parallel}) GPUs",
        f"!('{GPU_RESOURCE}' in self.resources.{side})"
        f" || {cel_quantity(quoted)}.compareTo(quantity('0').add(self.tensorParallel)) == 0",
        lambda self: (
            getattr(self.resources, side).get(GPU_RESOURCE, Quantity(self.tensor_parallel)).value
            == self.tensor_parallel
        ),
    )


class _WorkerRole(_Role):
    tensor_parallel: int = Field(default=1, ge=1, le=8, description="GPUs per worker, in one pod")
    kv_cache_memory: PositiveQuantity | None = Field(
        default=None, description="size of the KV pool; omitted: from device memory"
    )

    rules = (_gpus("limits"), _gpus("requests"))


class PrefillRole(_WorkerRole):
    """Workers that compute prompts."""

    replicas: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="0: combined, decode workers prefill themselves; omitted: left to an autoscaler or `kubectl scale`",
    )


class DecodeRole(_WorkerRole):
    """Workers that produce the following tokens."""

    replicas: int | None = Field(
        default=None, ge=1, le=1000, description="omitted: left to an autoscaler; zero is a ScalingPolicy's to choose"
    )


class RouterService(Model):
    """The Service that clients use."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(default="ClusterIP", description="how it is reached")
    annotations: dict[str, str] = Field(default={}, max_length=64, description="for load balancers and the like")


class RouterAuth(Model):
    """Who may ask."""

    api_keys_secret_ref: ApiKeysRef = Field(description="Secret with the accepted keys")


class RouterTls(Model):
    """TLS of the public ports."""

    secret_name: ObjectName = Field(description="Secret of type kubernetes.io/tls")


class RouterRole(_Role):
    """Processes that clients talk to."""

    replicas: int | None = Field(default=None, ge=1, le=100, description="omitted: left to an autoscaler")
    service: RouterService = Field(default=RouterService(), description="the Service that clients use")
    auth: RouterAuth | None = Field(default=None, description="omitted: no API key is asked for")
    tls: RouterTls | None = Field(default=None, description="omitted: plain HTTP and gRPC")
