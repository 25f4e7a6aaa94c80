"""Between the wire (protobuf) and the plain records of request.py and fleet.py.

Owns: every field-by-field copy, in both directions, so that no other module touches a protobuf field of the internal
interface. Must not: decide anything or do I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TypeVar

from lanewise.errors import ErrorCode, LanewiseError, invalid
from lanewise.fleet import Lane, Link, LinkState, Role, WorkerIdentity, WorkerStats
from lanewise.request import Failure, FinishReason, Mode, Partner, Sampling, Submission, Token
from lanewise.rpc import lanewise_pb2 as pb

E = TypeVar("E", bound=StrEnum)


def _member(kind: type[E], value: str, default: E) -> E:
    """The member of that value; `default` for a word that only a newer version knows."""
    try:
        return kind(value)
    except ValueError:
        return default


def sampling_to_wire(sampling: Sampling) -> pb.SamplingWire:
    return pb.SamplingWire(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sorted(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
    )


def sampling_from_wire(wire: pb.SamplingWire) -> Sampling:
    return Sampling(
        max_tokens=wire.max_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        repetition_penalty=wire.repetition_penalty,
        logit_bias=dict(wire.logit_bias),
        seed=wire.seed,
        min_tokens=wire.min_tokens,
        stop_token_ids=frozenset(wire.stop_token_ids),
        ignore_eos=wire.ignore_eos,
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
    )


def submit_to_wire(submission: Submission) -> pb.Submit:
    partner = submission.partner
    return pb.Submit(
        request_id=submission.request_id,
        epoch=submission.epoch,
        mode=submission.mode.value,
        prompt_ids=submission.prompt_ids,
        resumed_output_ids=submission.resumed_output_ids,
        sampling=sampling_to_wire(submission.sampling),
        partner_kv_address=partner.kv_address if partner else "",
        partner_incarnation=partner.incarnation if partner else "",
        deadline_s=submission.deadline_s,
        ttft_target_s=submission.ttft_target_s,
        tenant_salt=submission.tenant_salt,
    )


def submit_from_wire(wire: pb.Submit) -> Submission:
    """Raises INVALID_REQUEST for what no router of this version sends (the worker answers `failed` with it)."""
    try:
        mode = Mode(wire.mode)
    except ValueError:
        raise invalid(f"unknown mode {wire.mode!r}", "mode") from None
    if not wire.request_id or wire.epoch < 1:
        raise invalid("a submission needs a request_id and an epoch from 1", "request_id")
    if not wire.prompt_ids:
        raise invalid("a submission needs at least one prompt id", "prompt_ids")
    partner = None
    if wire.partner_incarnation:
        partner = Partner(kv_address=wire.partner_kv_address, incarnation=wire.partner_incarnation)
    if mode is not Mode.LOCAL and partner is None:
        raise invalid(f"mode {mode} needs a partner", "partner_incarnation")
    return Submission(
        request_id=wire.request_id,
        epoch=wire.epoch,
        mode=mode,
        prompt_ids=tuple(wire.prompt_ids),
        resumed_output_ids=tuple(wire.resumed_output_ids),
        sampling=sampling_from_wire(wire.sampling),
        partner=partner,
        deadline_s=wire.deadline_s,
        ttft_target_s=wire.ttft_target_s if wire.HasField("ttft_target_s") else None,
        tenant_salt=wire.tenant_salt,
    )


def tokens_to_wire(tokens: Iterable[Token]) -> pb.Step:
    step = pb.Step()
    for token in tokens:
        out = step.tokens.add(
            request_id=token.request_id, epoch=token.epoch, index=token.index, token_id=token.token_id
        )
        if token.logprob is not None:
            out.logprob = token.logprob
            for token_id, logprob in token.top:
                out.top.add(token_id=token_id, logprob=logprob)
        if token.finish is not None:
            out.finish = token.finish.value
    return step


def tokens_from_wire(step: pb.Step) -> list[Token]:
    return [
        Token(
            request_id=out.request_id,
            epoch=out.epoch,
            index=out.index,
            token_id=out.token_id,
            logprob=out.logprob if out.HasField("logprob") else None,
            top=tuple([(top.token_id, top.logprob) for top in out.top]) if out.top else (),
            finish=FinishReason(out.finish) if out.finish else None,
        )
        for out in step.tokens
    ]


def failure_to_wire(failure: Failure) -> pb.Failed:
    return pb.Failed(
        request_id=failure.request_id,
        epoch=failure.epoch,
        code=failure.code.value,
        message=failure.message,
        retryable=failure.retryable,
    )


def failure_from_wire(wire: pb.Failed) -> Failure:
    code = _member(ErrorCode, wire.code, ErrorCode.INTERNAL)
    return Failure(wire.request_id, wire.epoch, code, wire.message, wire.retryable)


def failure_of(submission: Submission, error: LanewiseError, *, retryable: bool = False) -> Failure:
    return Failure(submission.request_id, submission.epoch, error.code, error.message, retryable)


def description_to_wire(identity: WorkerIdentity, *, memory_bytes: int = 0, tokenizer_hash: str = "") -> pb.Description:
    return pb.Description(
        role=identity.role.value,
        name=identity.name,
        incarnation=identity.incarnation,
        address=identity.address,
        kv_address=identity.kv_address,
        model=identity.model,
        fingerprint=identity.fingerprint,
        fingerprint_fields=dict(identity.fingerprint_fields),
        max_context_tokens=identity.max_context_tokens,
        kv_capacity_tokens=identity.kv_capacity_tokens,
        vocab_size=identity.vocab_size,
        device=identity.device,
        pid=identity.pid,
        kv_bytes_per_token=identity.kv_bytes_per_token,
        power_watts=identity.power_watts,
        memory_bytes=memory_bytes,
        tokenizer_hash=tokenizer_hash,
    )


def description_from_wire(wire: pb.Description) -> WorkerIdentity:
    """Raises ValueError for a role this version does not know."""
    return WorkerIdentity(
        role=Role(wire.role),
        name=wire.name,
        incarnation=wire.incarnation,
        address=wire.address,
        kv_address=wire.kv_address,
        model=wire.model,
        fingerprint=wire.fingerprint,
        fingerprint_fields=dict(wire.fingerprint_fields),
        max_context_tokens=wire.max_context_tokens,
        kv_capacity_tokens=wire.kv_capacity_tokens,
        vocab_size=wire.vocab_size,
        device=wire.device,
        pid=wire.pid,
        kv_bytes_per_token=wire.kv_bytes_per_token,
        power_watts=wire.power_watts,
    )


_STATS_NUMBERS = (
    "queued_requests",
    "queued_tokens",
    "running_requests",
    "running_context_tokens",
    "kv_used_tokens",
    "kv_capacity_tokens",
    "kv_cached_tokens",
    "decode_step_s",
    "queue_wait_s",
    "lane_generation",
    "lane_age_s",
    "draining",
    "transfers",
    "preemptions",
    "leaked_blocks",
    "drain_eta_s",
    "handover",
    "routers",
    "cost_batches",
)


def stats_to_wire(stats: WorkerStats) -> pb.Stats:
    numbers = {name: getattr(stats, name) for name in _STATS_NUMBERS}
    wire = pb.Stats(cost=dict(stats.cost), counters=dict(stats.counters), lane=stats.lane.value, **numbers)
    for link in stats.links:
        wire.links.add(
            peer=link.peer,
            state=link.state.value,
            reason=link.reason,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            latency_s=link.latency_s,
        )
    return wire


def stats_from_wire(wire: pb.Stats) -> WorkerStats:
    """Unknown lanes and link states of a newer worker read as ANY and UNTESTED."""
    links = tuple(
        Link(
            peer=link.peer,
            state=_member(LinkState, link.state, LinkState.UNTESTED),
            reason=link.reason,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            latency_s=link.latency_s,
        )
        for link in wire.links
    )
    numbers = {n: getattr(wire, n) for n in _STATS_NUMBERS}
    lane = _member(Lane, wire.lane, Lane.ANY)
    return WorkerStats(cost=dict(wire.cost), counters=dict(wire.counters), lane=lane, links=links, **numbers)
