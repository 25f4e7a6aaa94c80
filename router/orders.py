"""The records of a request at the router: what was asked, one attempt at it, and what a transition asks to be done.

Owns: these shapes. Must not: contain behaviour beyond reading itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from lanewise.errors import LanewiseError
from lanewise.request import FinishReason, Sampling, Submission, Token

SHORTEST_HOLD_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The knobs of RouterConfig that bound a request."""

    hold_timeout_s: float
    retry_budget: int
    commit_to_token_s: float

    def holding(self, seconds: float, longest_s: float) -> Limits:
        """These with another hold_timeout_s, within 1 s and `longest_s`; what is no number changes nothing."""
        if math.isnan(seconds):
            return self
        return replace(self, hold_timeout_s=min(max(seconds, SHORTEST_HOLD_S), longest_s))


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for, in token ids; never changes."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    deadline_at: float  # on the router's monotonic clock
    ttft_target_s: float | None
    tenant_salt: bytes = b""


class Phase(StrEnum):
    WAITING = "waiting"  # needs a pair: held, or backing off until `not_before`
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Submit:
    incarnation: str
    submission: Submission


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell the worker to stop an attempt; it no longer counts as in flight there."""

    incarnation: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Release:
    """The worker has finished its part: it no longer counts as in flight there."""

    incarnation: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Emit:
    token: Token


@dataclass(frozen=True, slots=True)
class End:
    """The one end of a request."""

    reason: FinishReason
    error: LanewiseError | None = None
    stop_reason: str = ""  # the stop string, or the stop id, that ended it
    cached_tokens: int = 0


Action = Submit | Cancel | Release | Emit | End


@dataclass(slots=True)
class Attempt:
    epoch: int
    prefill: str | None
    decode: str
    fingerprint: str
    first_index: int  # of the first token that this attempt produces
    engaged: set[str]  # incarnations that still work on it
    committed_at: float | None = None
    decode_spoke: bool = False  # the decode side has produced a token of its own
    early: dict[int, Token] = field(default_factory=dict)  # tokens that overtook an earlier one on another session

    def committed_after(self, num_outputs: int) -> bool:
        """Whether the prefill worker no longer matters: the KV is over and token 1 of this attempt has come."""
        return self.committed_at is not None and num_outputs > self.first_index
