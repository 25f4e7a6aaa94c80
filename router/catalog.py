"""The models this router can serve, learned from the workers' `Describe`.

Owns: one tokenizer per model, and the limits that requests are checked against. A model stays known after its last
worker has gone, so that requests can be held for the next one. Must not: talk to workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lanewise.errors import ErrorCode, LanewiseError
from lanewise.fleet import Role
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    tokenizer: Tokenizer
    tokenizer_hash: str
    max_context_tokens: int
    vocab_size: int
    kv_capacity_tokens: int = 0  # of a decode worker; 0: not known yet
    defaults: dict[str, Any] = field(default_factory=dict)  # the model's own generation defaults
    created: int = 0
    base: dict[str, float] = field(default_factory=dict, compare=False)  # kept by sampling.py, made of `defaults`

    @property
    def max_total_tokens(self) -> int:
        """Prompt and output together: what the model can attend to, and what a worker's cache can hold."""
        if not self.kv_capacity_tokens:
            return self.max_context_tokens
        return min(self.max_context_tokens, self.kv_capacity_tokens)


class Catalog:
    def __init__(self, created: int, expected: str = "") -> None:
        self.expected = expected  # the name that this service is configured to serve; empty: not told
        self._models: dict[str, Model] = {}
        self._created = created
        self._learning = asyncio.Lock()
        self._any = asyncio.Event()

    def knows(self, description: pb.Description) -> bool:
        model = self._models.get(description.model)
        return model is not None and model.tokenizer_hash == description.tokenizer_hash

    async def learn(self, reply: pb.DescribeReply) -> None:
        """Take a `Describe` reply that carries the tokenizer. Building one takes a moment: it happens in a thread."""
        description = reply.description
        async with self._learning:  # workers that start together serve the same tokenizer: build it once
            if self.knows(description):
                return
            tokenizer = await asyncio.to_thread(
                Tokenizer,
                reply.tokenizer_json,
                chat_template=reply.chat_template,
                special_tokens=dict(reply.special_tokens),
                eos_ids=list(reply.eos_token_ids),
            )
            self._any.set()
            self._models[description.model] = Model(
                name=description.model,
                tokenizer=tokenizer,
                tokenizer_hash=description.tokenizer_hash,
                max_context_tokens=description.max_context_tokens,
                vocab_size=description.vocab_size or tokenizer.vocab_size,
                defaults=json.loads(reply.generation_defaults_json or "{}"),
                created=self._created,
            )

    def update(self, description: pb.Description) -> None:
        """A welcomed worker states its limits."""
        model = self._models[description.model]
        capacity = model.kv_capacity_tokens
        if description.role == Role.DECODE:
            capacity = description.kv_capacity_tokens
        self._models[description.model] = replace(
            model, max_context_tokens=description.max_context_tokens, kv_capacity_tokens=capacity
        )

    async def wait(self, timeout_s: float) -> None:
        """Until some model is known, or that long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._any.wait()

    @property
    def known(self) -> bool:
        """Whether any worker has told of its model yet."""
        return bool(self._models)

    def models(self) -> list[Model]:
        return list(self._models.values())

    def check_name(self, name: str) -> None:
        """Raises MODEL_NOT_FOUND where it is known, before any worker is, that nothing of that name is served here."""
        if name and self.expected and name != self.expected and name not in self._models:
            raise _not_found(name, [*self._models, self.expected])

    def get(self, name: str) -> Model:
        """The model of that name; the only model where the client names none."""
        model = self._models.get(name)
        if model is not None:
            return model
        if not self._models:
            raise LanewiseError(
                ErrorCode.NO_WORKERS, "no worker has told this router of a model yet", retry_after_s=1.0
            )
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        raise _not_found(name, self._models)


def _not_found(name: str, names: Iterable[str]) -> LanewiseError:
    known = ", ".join(sorted(set(names)))
    return LanewiseError(ErrorCode.MODEL_NOT_FOUND, f"no model {name!r} is served here; known: {known}", param="model")
