"""What goes over the internal wire comes back as it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanewise.errors import ErrorCode, LanewiseError
from lanewise.fleet import Lane, Link, LinkState, Role, WorkerIdentity, WorkerStats
from lanewise.request import Failure, FinishReason, Mode, Partner, Sampling, Submission, Token
from lanewise.rpc import convert
from lanewise.rpc import lanewise_pb2 as pb

uint32 = st.integers(0, 2**32 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
ids = st.lists(uint32, min_size=1, max_size=20).map(tuple)
samplings = st.builds(
    Sampling,
    max_tokens=uint32,
    temperature=finite,
    top_p=finite,
    top_k=uint32,
    min_p=finite,
    logit_bias=st.dictionaries(uint32, finite, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.frozensets(uint32, max_size=3),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
submissions = st.builds(
    Submission,
    request_id=st.uuids().map(str),
    epoch=st.integers(1, 1000),
    mode=st.sampled_from(Mode),
    prompt_ids=ids,
    resumed_output_ids=st.lists(uint32, max_size=5).map(tuple),
    sampling=samplings,
    partner=st.builds(Partner, kv_address=st.text(max_size=9), incarnation=st.uuids().map(str)),
    deadline_s=finite,
    ttft_target_s=st.none() | finite,
    tenant_salt=st.binary(max_size=8),
)
tokens = st.builds(
    Token,
    request_id=st.uuids().map(str),
    epoch=st.integers(1, 9),
    index=uint32,
    token_id=uint32,
    logprob=finite,
    top=st.lists(st.tuples(uint32, finite), max_size=3).map(tuple),
    finish=st.none() | st.sampled_from(FinishReason),
)


@given(submissions)
def test_submissions_survive_the_wire(submission: Submission) -> None:
    raw = convert.submit_to_wire(submission).SerializeToString()
    assert convert.submit_from_wire(pb.Submit.FromString(raw)) == submission


@given(st.lists(tokens, max_size=5))
def test_tokens_survive_the_wire(batch: list[Token]) -> None:
    raw = convert.tokens_to_wire(batch).SerializeToString()
    assert convert.tokens_from_wire(pb.Step.FromString(raw)) == batch


def test_statistics_and_identity_survive_the_wire() -> None:
    link = Link("peer", LinkState.VERIFIED, "", 1e9, 0.001)
    stats = WorkerStats(
        queued_tokens=7,
        cost={"a": 1.5},
        counters={"bytes_sent": 9},
        lane=Lane.SHORT,
        draining=True,
        links=(link,),
        preemptions=3,
    )
    assert convert.stats_from_wire(pb.Stats.FromString(convert.stats_to_wire(stats).SerializeToString())) == stats
    identity = WorkerIdentity(Role.DECODE, "d0", "inc", "a:1", "tcp://b:2", "m", "ff", {"k": "v"}, 9, 8, 7, "cpu", 6)
    assert convert.description_from_wire(convert.description_to_wire(identity)) == identity


def test_failures_of_a_newer_worker_read_as_internal() -> None:
    failure = Failure("r", 2, ErrorCode.OVERLOADED, "full", True)
    assert convert.failure_from_wire(convert.failure_to_wire(failure)) == failure
    assert convert.failure_from_wire(pb.Failed(code="FROM_THE_FUTURE")).code is ErrorCode.INTERNAL


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"mode": "teleport"}, "mode"),
        ({"epoch": 0}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"prompt_ids": []}, "prompt_ids"),
        ({"partner_incarnation": ""}, "partner_incarnation"),
    ],
)
def test_senseless_submissions_are_refused_by_name(change: dict[str, object], param: str) -> None:
    fields: dict[str, object] = {
        "request_id": "r",
        "epoch": 1,
        "mode": "prefill",
        "prompt_ids": [1],
        "partner_incarnation": "i",
    }
    with pytest.raises(LanewiseError) as raised:
        convert.submit_from_wire(pb.Submit(**{**fields, **change}))
    assert raised.value.param == param
    assert raised.value.code is ErrorCode.INVALID_REQUEST
