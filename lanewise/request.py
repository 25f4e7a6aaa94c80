"""What one request is, in token ids: sampling, submission to a worker, tokens coming back.

Owns: the plain records that travel between router, workers, policies and the engine.
Must not: know text (stop strings and detokenising belong to the router), transports, torch or clocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from lanewise.errors import ErrorCode


class FinishReason(StrEnum):
    STOP = "stop"  # EOS, a stop id, or (at the router) a stop string
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The neutral value of every field changes nothing.

    Token = argmax(filtered logits / temperature + Gumbel(seed, absolute position)); temperature 0 is greedy.
    Order of filters: logit_bias, penalties, min_tokens, then temperature, top_k, top_p, min_p.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0  # unsigned 64 bit; the router always sets one
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's plus the k most likely


class Mode(StrEnum):
    """What a worker is to do with a submission."""

    PREFILL = "prefill"  # compute the prompt, send token 1 to the router and the KV to `partner`
    DECODE = "decode"  # take the KV from `partner`, continue at token 2
    LOCAL = "local"  # do everything here (decode workers only)


@dataclass(frozen=True, slots=True)
class Partner:
    """The other worker of the pair, as the router saw it when it chose."""

    kv_address: str  # the decode side's ZeroMQ endpoint; empty when the partner is the prefill side
    incarnation: str


@dataclass(frozen=True, slots=True)
class Submission:
    """One attempt of one request, as a worker receives it. Identity is (request_id, epoch)."""

    request_id: str  # the router's own UUID, one per choice
    epoch: int  # attempt number, from 1
    mode: Mode
    prompt_ids: tuple[int, ...]
    resumed_output_ids: tuple[int, ...]  # output of earlier attempts; the next token has index len(resumed)
    sampling: Sampling
    partner: Partner | None
    deadline_s: float  # seconds left for the whole request when it was sent
    ttft_target_s: float | None  # soft: orders and scores, never ends a request
    tenant_salt: bytes = b""  # keys the content hashes, so that tenants never share cache

    @property
    def key(self) -> tuple[str, int]:
        return (self.request_id, self.epoch)


@dataclass(frozen=True, slots=True)
class Token:
    """One output token. `index` counts output tokens of the request over all attempts, from 0."""

    request_id: str
    epoch: int
    index: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first
    finish: FinishReason | None = None  # set on the last token of the request


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of an attempt that produced no (further) token."""

    request_id: str
    epoch: int
    code: ErrorCode
    message: str
    retryable: bool  # True: the router may try again with a higher epoch at no cost (BUSY, DRAINING, re-pairing)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice `choice` of a request with `n` choices: choice 0 keeps the request's own seed.

    A hash and not an offset, so that neighbouring seeds given by a user do not share choices.
    """
    if choice == 0:
        return seed & (2**64 - 1)
    raw = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little")
