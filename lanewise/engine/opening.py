"""Between the records of requests and the engine's own: submission to sequence, sampled id to token.

Owns: the limits on token ids and lengths, and the key under which a request's KV is cached.
Must not: take pages or compute anything.
"""

from __future__ import annotations

from typing import Protocol

from lanewise.engine.sampler import Sampled
from lanewise.engine.sequence import Sequence
from lanewise.errors import ErrorCode, LanewiseError, invalid
from lanewise.policy.blocks import cache_key
from lanewise.request import Submission, Token


class Limits(Protocol):
    """What of an engine matters here."""

    eos_ids: frozenset[int]
    vocab_size: int
    max_context_tokens: int
    fingerprint: str


def open_sequence(submission: Submission, limits: Limits, capacity_tokens: int) -> tuple[Sequence, bytes]:
    """The sequence and its cache key. Raises LanewiseError for ids or lengths this worker can never serve."""
    ids = [*submission.prompt_ids, *submission.resumed_output_ids]
    if max(ids) >= limits.vocab_size:
        raise invalid(f"token id {max(ids)} is outside the vocabulary of {limits.vocab_size}", "prompt")
    if len(submission.prompt_ids) >= limits.max_context_tokens:
        raise LanewiseError(
            ErrorCode.PROMPT_TOO_LONG,
            f"the prompt has {len(submission.prompt_ids)} tokens; this model takes {limits.max_context_tokens} "
            "with the answer",
            param="prompt",
        )
    longest = min(len(submission.prompt_ids) + submission.sampling.max_tokens, limits.max_context_tokens)
    if longest > capacity_tokens:
        raise LanewiseError(
            ErrorCode.PROMPT_TOO_LONG,
            f"prompt and answer may take {longest} tokens; the whole KV pool of this worker holds {capacity_tokens}",
            param="max_tokens",
        )
    sequence = Sequence(
        key=submission.key,
        ids=ids,
        num_prompt=len(submission.prompt_ids),
        sampling=submission.sampling,
        eos_ids=limits.eos_ids,
        max_context_tokens=limits.max_context_tokens,
    )
    return sequence, cache_key(limits.fingerprint, submission.tenant_salt)


def take_token(sequence: Sequence, sampled: Sampled) -> Token:
    """Append what was sampled to the sequence and say what it means for the request."""
    index = sequence.num_output
    sequence.ids.append(sampled.token_id)
    finish = sequence.finish(sampled.token_id)
    return Token(*sequence.key, index, sampled.token_id, sampled.logprob, sampled.top, finish)
