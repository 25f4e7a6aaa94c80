"""The LLMService resource (`lanewise.io/v1alpha1`): one model for `lanewise up`, the operator and the simulator.

Owns: fields, defaults, limits and the rules between fields. The CRD schema is generated from these classes, so every
type here is structural: no unions but int-or-string, no floats. Field names are camelCase in files.
Must not: read files (spec_yaml.py does), fill in replicas (an omitted count belongs to an autoscaler), touch a cluster.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lanewise.spec_model import EachRule, Metadata, Model, Rule
from lanewise.spec_roles import DecodeRole, PrefillRole, RouterRole
from lanewise.spec_source import ModelSource, SecretRef
from lanewise.spec_types import Duration, IntOrPercent, PositiveDuration

API_VERSION = "lanewise.io/v1alpha1"


class Slo(Model):
    """What clients should see."""

    ttft: PositiveDuration = Field(default=PositiveDuration("400ms"), description="time to first token")
    tpot: PositiveDuration = Field(default=PositiveDuration("50ms"), description="mean time per output token after it")


class Lanes(Model):
    """Classes of requests by predicted prefill work."""

    boundary: Literal["Learned", "Fixed"] = Field(
        default="Learned", description="who says where short ends: the measurements, or shortMaxTokens"
    )
    short_max_tokens: int | None = Field(
        default=None, ge=1, le=16_777_216, description="uncached tokens up to which a request is short"
    )

    rules = (
        Rule(
            "shortMaxTokens",
            "required with boundary Fixed, such as 256",
            "self.boundary != 'Fixed' || has(self.shortMaxTokens)",
            lambda self: self.boundary != "Fixed" or self.short_max_tokens is not None,
            "FieldValueRequired",
        ),
        Rule(
            "shortMaxTokens",
            "cannot be set with boundary Learned; expected boundary: Fixed",
            "self.boundary != 'Learned' || !has(self.shortMaxTokens)",
            lambda self: self.boundary != "Learned" or self.short_max_tokens is None,
            "FieldValueForbidden",
        ),
    )


class Transfer(Model):
    """How KV travels from prefill to decode workers."""

    channel: Literal["Auto", "ZeroMQ", "NCCL", "IPC"] = Field(default="Auto", description="the link that is used")
    encoding: Literal["Native", "Int8", "KIVI4", "KIVI2"] = Field(
        default="Native",
        description="how KV is written on the wire: all but Native lose quality; KIVI4 and KIVI2: experimental",
    )
    encryption: Literal["None", "Authenticated", "Full"] = Field(
        default="None", description="Authenticated: control is encrypted and data carries a MAC; Full: both encrypted"
    )
    secret_ref: SecretRef | None = Field(
        default=None, description="Secret with the keys, a folder of `lanewise keys make`; the operator wants it named"
    )

    rules = (
        Rule(
            "secretRef",
            "nothing is encrypted with it; expected encryption Authenticated or Full",
            "self.encryption != 'None' || !has(self.secretRef)",
            lambda self: self.encryption != "None" or self.secret_ref is None,
            "FieldValueForbidden",
        ),
    )


class Rollout(Model):
    """How many workers of a role may be added or missing while they are replaced."""

    max_surge: IntOrPercent = Field(default=IntOrPercent.parse(0), description="pods above the wanted number")
    max_unavailable: IntOrPercent = Field(default=IntOrPercent.parse(1), description="pods below the wanted number")

    rules = (
        Rule(
            "maxUnavailable",
            "expected more than 0 when maxSurge is 0, or no pod could ever be replaced",
            "![self.maxSurge, self.maxUnavailable].all(n, n == 0 || n == '0' || n == '0%')",
            lambda self: not (self.max_surge.is_zero and self.max_unavailable.is_zero),
        ),
    )


class Drain(Model):
    """How a pod leaves."""

    timeout: Duration = Field(default=Duration("60s"), description="how long requests may finish in place first")
    max: Duration = Field(default=Duration("10m"), description="how long those that cannot move may finish in place")

    rules = (
        Rule(
            "timeout",
            "expected at most max ({self.max}), got {self.timeout}",
            "duration(self.timeout) <= duration(self.max)",
            lambda self: self.timeout.seconds <= self.max.seconds,
        ),
    )


class Runtime(Model):
    """What the pods run."""

    version: str | None = Field(
        default=None, max_length=128, description="pins image and rendering of the pods; see status.runtime"
    )


class LLMServiceSpec(Model):
    """What is wanted."""

    paused: bool = Field(default=False, description="the operator changes nothing while true")
    runtime: Runtime = Field(default=Runtime(), description="what the pods run")
    model: ModelSource = Field(description="which model, under which name")
    slo: Slo = Field(default=Slo(), description="what clients should see")
    lanes: Lanes = Field(default=Lanes(), description="classes of requests by predicted prefill work")
    disaggregation: Literal["Auto", "Always", "Never"] = Field(
        default="Auto", description="whether prompts are computed by prefill workers; Auto: where it is faster"
    )
    prefill: PrefillRole = Field(default=PrefillRole(), description="workers that compute prompts")
    decode: DecodeRole = Field(default=DecodeRole(), description="workers that produce the following tokens")
    router: RouterRole = Field(default=RouterRole(), description="processes that clients talk to")
    transfer: Transfer = Field(default=Transfer(), description="how KV travels from prefill to decode workers")
    rollout: Rollout = Field(default=Rollout(), description="how workers are replaced")
    drain: Drain = Field(default=Drain(), description="how a pod leaves")
    startup_timeout: PositiveDuration = Field(
        default=PositiveDuration("30m"), description="how long a worker may load its model"
    )
    image_pull_secrets: list[SecretRef] = Field(
        default=[],
        max_length=16,
        description="Secrets with credentials for the images",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )

    rules = (
        Rule(
            "prefill.replicas",
            "expected at least 1 with disaggregation Always, got 0",
            "self.disaggregation != 'Always' || !has(self.prefill.replicas) || self.prefill.replicas != 0",
            lambda self: not (self.disaggregation == "Always" and self.prefill.replicas == 0),
        ),
        EachRule(
            "imagePullSecrets",
            "listed twice",
            "",
            lambda self: [
                (index,) for index, ref in enumerate(self.image_pull_secrets) if ref in self.image_pull_secrets[:index]
            ],
        ),
    )


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
