"""Which model a service serves, where its files come from and where they are kept.

Owns: `spec.model` of LLMService and the references to Secrets. Must not: open or download anything.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lanewise.spec_model import Model, Rule, Transition
from lanewise.spec_types import MODEL_URI, REVISION, SECRET_KEY, SERVED_NAME, ObjectName, PositiveQuantity, cel_quantity

_HF = "self.uri.startsWith('hf://')"
_NAME = "(has({0}.servedName) ? {0}.servedName : {0}.uri.find('[^/]+/*$').replace('/', ''))"


class SecretRef(Model):
    """A Secret in the namespace of the resource; pods mount it, the operator never reads it."""

    name: ObjectName = Field(description="name of the object")


class SecretKeyRef(SecretRef):
    key: str = Field(default="token", pattern=SECRET_KEY, max_length=253, description="key in the Secret")


class ApiKeysRef(SecretRef):
    key: str = Field(default="api-keys", pattern=SECRET_KEY, max_length=253, description="one API key per line")


class Cache(Model):
    """Where downloaded weights live: a claim of the user's, or one the operator makes (and never deletes by itself)."""

    claim: ObjectName | None = Field(default=None, description="an existing PersistentVolumeClaim")
    size: PositiveQuantity | None = Field(default=None, description="size of the claim to make; it may only grow")
    storage_class: ObjectName | None = Field(default=None, description="of the claim to make; default: the cluster's")
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"] | None = Field(
        default=None, description="of the claim to make; default ReadWriteOnce, which keeps all workers on one node"
    )
    delete_policy: Literal["Retain", "Delete"] = Field(
        default="Retain", description="whether the claim that was made goes with the service"
    )

    rules = (
        Rule(
            "",
            "expected claim (an existing one) or size (to make one)",
            "has(self.claim) || has(self.size)",
            lambda self: self.claim is not None or self.size is not None,
            "FieldValueRequired",
        ),
        *(
            Rule(
                camel,
                "cannot be set together with claim",
                f"!has(self.claim) || !has(self.{camel})",
                lambda self, name=name: self.claim is None or getattr(self, name) is None,  # type: ignore[misc]
                "FieldValueForbidden",
            )
            for camel, name in (("size", "size"), ("storageClass", "storage_class"), ("accessMode", "access_mode"))
        ),
        Transition(
            "size",
            "a claim can grow, not shrink",
            "!has(self.size) || !has(oldSelf.size)"
            f" || {cel_quantity('self.size')}.compareTo({cel_quantity('oldSelf.size')}) >= 0",
        ),
        *(
            Transition(
                name,
                "a claim that was made keeps it; set claim to move to another one",
                f"!has(self.size) || !has(oldSelf.size) || (has(self.{name}) == has(oldSelf.{name})"
                f" && (!has(self.{name}) || self.{name} == oldSelf.{name}))",
            )
            for name in ("storageClass", "accessMode")
        ),
    )


class ModelSource(Model):
    """Which model, under which name."""

    uri: str = Field(
        pattern=MODEL_URI, max_length=512, description="hf://owner/name, pvc://claim/dir, file:///dir or builtin://name"
    )
    revision: str = Field(
        default="main", pattern=REVISION, max_length=128, description="branch, tag or commit of an hf:// model"
    )
    served_name: str | None = Field(
        default=None,
        pattern=SERVED_NAME,
        max_length=128,
        description="the name clients use, fixed for the life of the service; default: last part of uri",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="type of weights and KV"
    )
    max_context_tokens: int | None = Field(
        default=None, ge=16, le=16_777_216, description="prompt and output together; default: the model's own limit"
    )
    token_secret_ref: SecretKeyRef | None = Field(default=None, description="token for gated hf:// models")
    cache: Cache | None = Field(default=None, description="where an hf:// model is kept; default: in each pod")

    @property
    def name(self) -> str:
        """The name clients use."""
        return self.served_name or self.uri.rstrip("/").rpartition("/")[2]

    rules = (
        # The API server writes defaults out, so a field that is set says nothing; one with another value does.
        Rule(
            "cache",
            "is for hf:// models, uri is {self.uri}",
            f"{_HF} || !has(self.cache)",
            lambda self: self.uri.startswith("hf://") or self.cache is None,
            "FieldValueForbidden",
        ),
        Rule(
            "revision",
            "is for hf:// models, uri is {self.uri}",
            f"{_HF} || self.revision == 'main'",
            lambda self: self.uri.startswith("hf://") or self.revision == "main",
            "FieldValueForbidden",
        ),
        Rule(
            "tokenSecretRef",
            "is for hf:// models, uri is {self.uri}",
            f"{_HF} || !has(self.tokenSecretRef)",
            lambda self: self.uri.startswith("hf://") or self.token_secret_ref is None,
            "FieldValueForbidden",
        ),
        Transition(
            "servedName",
            "clients use this name: it stays while uri and revision may change; set servedName to the old name",
            f"{_NAME.format('self')} == {_NAME.format('oldSelf')}",
        ),
    )
