"""The status of an LLMService: typed, so that the CRD schema and the operator cannot disagree.

Owns: fields, condition types and what True means for each.
Must not: decide what a status says (operator/status.py does).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from lanewise.spec_model import Model

ConditionType = Literal[
    "Ready",
    "Progressing",
    "Degraded",
    "ModelReady",
    "RouterReady",
    "PrefillReady",
    "DecodeReady",
    "KVPathReady",
    "DisaggregationBeneficial",
]
CONDITION_TYPES: tuple[ConditionType, ...] = (
    "Ready",
    "Progressing",
    "Degraded",
    "ModelReady",
    "RouterReady",
    "PrefillReady",
    "DecodeReady",
    "KVPathReady",
    "DisaggregationBeneficial",
)
"""In the order in which `kubectl describe` shows them."""

MAX_MESSAGE = 1024


class _Status(Model):
    """Made by code as well as read from a cluster: both spellings of a field name are taken."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)


class Condition(_Status):
    """`metav1.Condition`: an observation. `last_transition_time` moves only when `status` does."""

    type: Annotated[str, Field(max_length=64)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$", max_length=128)]
    message: Annotated[str, Field(max_length=MAX_MESSAGE)] = ""
    observed_generation: int | None = None
    last_transition_time: Annotated[str | None, Field(json_schema_extra={"format": "date-time"})] = None


class RuntimeStatus(_Status):
    """What this service's pods are rendered with; a newer operator keeps it until spec.runtime.version says more."""

    version: Annotated[str, Field(max_length=128)]
    rendering: int = Field(ge=1, description="version of the rules that turn the resource into objects")
    control_image: Annotated[str, Field(max_length=512)]
    worker_image: Annotated[str, Field(max_length=512)]


class ModelStatus(_Status):
    """The commit that `revision` was resolved to, once."""

    uri: Annotated[str, Field(max_length=512)]
    revision: Annotated[str, Field(max_length=128)]
    commit: Annotated[str, Field(max_length=64)]


class RoleStatus(_Status):
    """Pods of one role."""

    desired: int = Field(default=0, ge=0)
    ready: int = Field(default=0, ge=0)
    draining: int = Field(default=0, ge=0)
    summary: Annotated[str, Field(max_length=32, description="ready/desired, for kubectl get")] = "0/0"


class LaneStatus(_Status):
    """One class of requests by predicted prefill work."""

    name: Annotated[str, Field(max_length=32)]
    max_tokens: int | None = Field(default=None, ge=0, description="omitted: no upper bound")
    workers: int = Field(default=0, ge=0)
    ttft_p99: Annotated[str | None, Field(max_length=32, description="rounded, such as 350ms")] = None


class LLMServiceStatus(_Status):
    observed_generation: int = 0
    runtime: RuntimeStatus | None = None
    model: ModelStatus | None = None
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    prefill: RoleStatus = RoleStatus()
    decode: RoleStatus = RoleStatus()
    router: RoleStatus = RoleStatus()
    lanes: list[LaneStatus] = Field(
        default_factory=list,
        max_length=8,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    url: Annotated[str | None, Field(max_length=512)] = None
