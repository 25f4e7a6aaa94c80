"""The state tables, exhaustively: every message in every state, twice, and with stale names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from lanewise.policy.blocks import KVLayout
from lanewise.request import Partner, Token
from lanewise.transfer import compat
from lanewise.transfer import messages as m
from lanewise.transfer.chunks import Slice, digest
from lanewise.transfer.protocol import (
    LINK_NEXT,
    RECEIVER_NEXT,
    SENDER_NEXT,
    Emit,
    LinkInput,
    LinkPhase,
    ReceiverInput,
    ReceiverState,
    Send,
    SenderInput,
    SenderState,
    Write,
)
from lanewise.transfer.receiver_core import ReceiverCore
from lanewise.transfer.records import Binding, Counters, Endpoint, Limits, Timers
from lanewise.transfer.sender_core import SenderCore

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=2, dtype="float32", dtype_bytes=4)
P, D, KEY = "prefill", "decode", ("r", 5)
BOUND = Binding.of(list(range(70)), b"k")
PEER = Partner("addr", D)
NAMES_TO_P, NAMES_TO_D = (D, P, *KEY), (P, D, *KEY)
WHOLE = Slice(0, 70, 0, 2, 0, 2)
CRC = b"12345678"
S, R = SenderState, ReceiverState


def end(name: str) -> Endpoint:
    return Endpoint(name, "f", {}, LAYOUT)


def renamed(messages: list[tuple[m.AnyMessage, Any]]) -> Iterator[tuple[m.AnyMessage, str]]:
    """Each message with each of its names that can be wrong."""
    for message, _ in messages:
        for name in ("src", "dst", "epoch", "request_id"):
            by_nature = isinstance(message, m.Stale) and name == "src"  # NACK_STALE comes from somebody new
            if hasattr(message, name) and not by_nature:
                yield message, name


# --- the tables themselves


@pytest.mark.parametrize(
    ("table", "states", "inputs", "ends"),
    [
        (SENDER_NEXT, SenderState, SenderInput, {S.RELEASED, S.ABORTED}),
        (RECEIVER_NEXT, ReceiverState, ReceiverInput, {R.COMMITTED, R.FREED}),
        (LINK_NEXT, LinkPhase, LinkInput, set()),
    ],
)
def test_table_is_closed_and_every_state_can_reach_an_end(table, states, inputs, ends):
    assert {state for state, _ in table} | ends == set(states)
    assert {event for _, event in table} == set(inputs)
    assert not {state for state, _ in table} & ends
    reach = {state: {table[state, event] for event in inputs if (state, event) in table} for state in states}
    for _ in states:
        reach = {state: to | {far for near in to for far in reach[near]} for state, to in reach.items()}
    assert all(reach[state] & ends for state in set(states) - ends) or not ends


def test_no_way_to_committed_but_through_verifying_and_none_back():
    assert [pair for pair, to in RECEIVER_NEXT.items() if to is R.COMMITTED] == [(R.VERIFYING, ReceiverInput.COMPLETE)]
    assert [pair for pair, to in SENDER_NEXT.items() if to is S.RELEASED] == [(S.AWAIT_ACK, SenderInput.COMMIT_ACK)]


# --- every message in every state of the sender


def sender_in(state: SenderState) -> tuple[SenderCore, Any]:
    core = SenderCore(end(P), Timers(), Limits(), Counters())
    core.begin(KEY, PEER, BOUND, ["p"], 0.0)
    transfer = core._transfers[KEY]
    if state is S.QUEUED:
        return core, transfer
    if state is S.ABORTED:
        core.abort(KEY, "test", 0.0)
        return core, transfer
    core.receive("addr", compat.hello_ack(end(D), P, "", 1 << 20), 0.0)
    if state is S.OFFERED:
        return core, transfer
    core.receive("addr", m.Grant(*NAMES_TO_P, 0, 1 << 20, 30.0), 0.0)
    core.ready(KEY, 64, None)
    chunk(core)
    if state is S.STREAMING:
        return core, transfer
    core.commit(KEY, Token(*KEY, 0, 1), 0.0)
    chunk(core)
    if state is S.RELEASED:
        core.receive("addr", m.CommitAck(*NAMES_TO_P), 0.0)
    return core, transfer


def chunk(core: SenderCore) -> None:
    chosen = core.next_chunk("addr")
    assert chosen is not None
    core.sent(*chosen, CRC, True, 0.0)


TO_SENDER: list[tuple[m.AnyMessage, SenderInput | None]] = [
    (compat.hello_ack(end(D), P, "", 1 << 20), SenderInput.LINK_UP),
    (compat.hello_ack(end(D), P, "differs", 1 << 20), SenderInput.FAIL),
    (m.Stale("new", P, D), SenderInput.FAIL),
    (m.ProbeAck(D, P, 1, CRC), None),
    (m.Grant(*NAMES_TO_P, 0, 1 << 20, 30.0), SenderInput.GRANT),
    (m.Grant(*NAMES_TO_P, 128, 1 << 20, 30.0), SenderInput.FAIL),  # more than the prompt has
    (m.BusyReply(*NAMES_TO_P, 1.0), SenderInput.REFUSED),
    (m.Nack(*NAMES_TO_P, "no"), SenderInput.REFUSED),
    (m.Nack(*NAMES_TO_P, "who?", True), SenderInput.HELLO_FIRST),
    (m.Ack(*NAMES_TO_P, 0, b"", 1 << 20), None),
    (m.Ack(*NAMES_TO_P, 1, b"\x01", 1 << 20, (0, 9)), None),
    (m.CommitAck(*NAMES_TO_P), SenderInput.COMMIT_ACK),
    (m.Abort(*NAMES_TO_P, "no"), SenderInput.FAIL),
    (m.AbortAck(*NAMES_TO_P, True), None),
    (m.Pong(D, P, (KEY,)), None),
    (m.Pong(D, P, (), True), None),
    # what a receiver never says
    (m.Begin(*NAMES_TO_P, 1, b"", bytes(16), 1), None),
    (m.Ping(D, P, ()), None),
]


def expected_sender(state: SenderState, message: m.AnyMessage, event: SenderInput | None) -> SenderState:
    link_is_up = state not in (S.QUEUED, S.ABORTED)
    if isinstance(message, m.HelloAck) and link_is_up:
        return state  # a doubled greeting
    if isinstance(message, m.Grant) and message.have_tokens and state in (S.QUEUED,):
        event = SenderInput.FAIL
    return state if event is None else SENDER_NEXT.get((state, event), state)


@pytest.mark.parametrize("state", list(SenderState))
@pytest.mark.parametrize(("message", "event"), TO_SENDER, ids=lambda value: str(type(value).__name__))
def test_every_message_in_every_state_of_the_sender(state, message, event):
    core, transfer = sender_in(state)
    assert transfer.state is state
    core.receive("addr", message, 0.1)
    after = expected_sender(state, message, event)
    assert transfer.state is after
    events = [a for a in core.receive("addr", message, 0.2) if isinstance(a, Emit)]
    assert transfer.state is after, "a duplicate changed the state"
    assert not events or isinstance(message, m.Stale), "a duplicate was reported"


@pytest.mark.parametrize("state", list(SenderState))
@pytest.mark.parametrize(("message", "change"), list(renamed(TO_SENDER)))
def test_stale_messages_change_nothing_at_the_sender(state, message, change):
    core, transfer = sender_in(state)
    value = 4 if change == "epoch" else "another"
    actions = core.receive("addr", msgspec.structs.replace(message, **{change: value}), 0.1)
    assert transfer.state is state or (change in ("epoch", "request_id") and getattr(message, "hello_first", False))
    assert not any(isinstance(action, Emit) for action in actions)


# --- every message in every state of the receiver


def commit_message(**change: Any) -> m.Commit:
    fields = {
        "chunks": 1,
        "digest": digest([(CRC, WHOLE)]),
        "tokens": 70,
        "prompt": BOUND.prompt,
        "index": 0,
        "token_id": 1,
        "logprob": None,
        "top": (),
        "finish": None,
    }
    return m.Commit(*NAMES_TO_D, **(fields | change))


def chunk_message(seq: int = 0, piece: Slice = WHOLE) -> m.Chunk:
    where = (piece.layer_lo, piece.layer_hi, piece.token_lo, piece.token_hi, piece.head_lo, piece.head_hi)
    return m.Chunk(*NAMES_TO_D, seq, *where, CRC)


def receiver_in(state: ReceiverState) -> tuple[ReceiverCore, Any]:
    core = ReceiverCore(end(D), Timers(), Limits(), Counters())
    core.receive(compat.hello(end(P), D), 0, 0.0)
    begin = m.Begin(*NAMES_TO_D, 70, BOUND.chain, BOUND.prompt, 1)
    if state is R.HELD:
        core.receive(begin, 0, 0.0)
        return core, core.table.live[KEY]
    core.expect(KEY, BOUND, 0.0)
    transfer = core.table.live[KEY]
    if state is R.EXPECTED:
        return core, transfer
    core.receive(begin, 0, 0.0)
    if state in (R.DRAINING, R.RECEIVING, R.VERIFYING, R.COMMITTED, R.GRANTED):
        core.grant(KEY, ["p"], 0, 0.0)
    if state is R.DRAINING:
        core.receive(chunk_message(), WHOLE.nbytes(LAYOUT), 0.0)  # the copy is under way
        assert not any(isinstance(action, Emit) for action in core.cancel(KEY, "test", 0.0))
    if state is R.FREED:
        core.cancel(KEY, "test", 0.0)
    if state is R.RECEIVING:
        core.receive(chunk_message(0, Slice(0, 64, 0, 2, 0, 2)), 64 * LAYOUT.bytes_per_token, 0.0)
        core.wrote(KEY, 0, True, 0.0)
    if state in (R.VERIFYING, R.COMMITTED):
        core.receive(commit_message(), 0, 0.0)
    if state is R.COMMITTED:
        core.receive(chunk_message(), WHOLE.nbytes(LAYOUT), 0.0)
        core.wrote(KEY, 0, True, 0.0)
    return core, transfer


TO_RECEIVER: list[tuple[m.AnyMessage, ReceiverInput | None]] = [
    (compat.hello(end(P), D), None),
    (m.Begin(*NAMES_TO_D, 70, BOUND.chain, BOUND.prompt, 1), ReceiverInput.BEGIN),
    (m.Begin(*NAMES_TO_D, 71, BOUND.chain, BOUND.prompt, 1), ReceiverInput.STOP),  # not what is expected
    (chunk_message(), ReceiverInput.CHUNK),
    (chunk_message(0, Slice(0, 64, 0, 1, 1, 2)), ReceiverInput.CHUNK),
    (chunk_message(7, Slice(0, 71, 0, 2, 0, 2)), ReceiverInput.STOP),
    (chunk_message(7, Slice(0, 64, 0, 3, 0, 2)), ReceiverInput.STOP),
    (chunk_message(7, Slice(9, 9, 0, 1, 0, 2)), ReceiverInput.STOP),
    (chunk_message(7, Slice(0, 64, 0, 1, 0, 3)), ReceiverInput.STOP),
    (chunk_message(7, Slice(0, 64, 0, 1, 1, 1)), ReceiverInput.STOP),
    (chunk_message(7, Slice(0, 64, 0, 1, 2, 1)), ReceiverInput.STOP),
    (chunk_message(280, Slice(0, 64, 0, 1, 0, 1)), ReceiverInput.STOP),  # 70 tokens x 2 layers x 2 heads
    (commit_message(chunks=2), ReceiverInput.COMMIT),
    (commit_message(tokens=69), ReceiverInput.STOP),
    (commit_message(prompt=bytes(16)), ReceiverInput.STOP),
    (m.Abort(*NAMES_TO_D, "no"), ReceiverInput.STOP),
    (m.Ping(P, D, (KEY,)), None),
    # what a sender never says
    (m.Grant(*NAMES_TO_D, 0, 1, 1.0), None),
    (m.CommitAck(*NAMES_TO_D), None),
    (m.Ack(*NAMES_TO_D, 0, b"", 1), None),
]


def expected_receiver(state: ReceiverState, message: m.AnyMessage, event: ReceiverInput | None) -> ReceiverState:
    receiving = state in (R.GRANTED, R.RECEIVING, R.VERIFYING)
    if event is ReceiverInput.STOP and isinstance(message, m.Chunk | m.Commit) and not receiving:
        return state  # nothing was granted, so there is nothing to contradict
    if event is ReceiverInput.STOP and isinstance(message, m.Begin) and state is not R.EXPECTED:
        return state  # it has its answer, the other one is refused
    if event is ReceiverInput.STOP and state is R.EXPECTED and isinstance(message, m.Abort):
        return state  # of a BEGIN that never came
    after = state if event is None else RECEIVER_NEXT.get((state, event), state)
    return R.FREED if after is R.DRAINING and state is not R.DRAINING else after


@pytest.mark.parametrize("state", list(ReceiverState))
@pytest.mark.parametrize(("message", "event"), TO_RECEIVER, ids=lambda value: str(type(value).__name__))
def test_every_message_in_every_state_of_the_receiver(state, message, event):
    core, transfer = receiver_in(state)
    assert transfer.state is state
    size = message.slice.nbytes(LAYOUT) if isinstance(message, m.Chunk) else 0
    core.receive(message, size, 0.1)
    after = expected_receiver(state, message, event)
    assert transfer.state is after
    actions = core.receive(message, size, 0.2)
    assert transfer.state is after, "a duplicate changed the state"
    assert not any(isinstance(action, Emit | Write) for action in actions), "a duplicate had an effect"


@pytest.mark.parametrize("state", list(ReceiverState))
@pytest.mark.parametrize(("message", "change"), list(renamed(TO_RECEIVER)))
def test_stale_messages_change_nothing_at_the_receiver(state, message, change):
    core, transfer = receiver_in(state)
    value = 4 if change == "epoch" else "another"
    stale = msgspec.structs.replace(message, **{change: value})
    actions = core.receive(stale, 0, 0.1)
    assert transfer.state is state
    assert not any(isinstance(action, Emit | Write) for action in actions)
    if change == "dst":
        assert actions[0].message == m.Stale(D, P, "another")
    if change == "epoch" and isinstance(message, m.Begin):
        assert actions[0].message.reason == "stale epoch"


def test_recorded_result_is_given_again():
    core, _ = receiver_in(R.COMMITTED)
    begin = m.Begin(*NAMES_TO_D, 70, BOUND.chain, BOUND.prompt, 1)
    for message in (begin, commit_message(), m.Abort(*NAMES_TO_D, "too late"), chunk_message()):
        assert [action.message for action in core.receive(message, 0, 1.0)] == [m.CommitAck(*NAMES_TO_P)]
    core, _ = receiver_in(R.OFFERED)
    core.refuse(KEY, True, "full", 0.7, 0.0)
    assert core.receive(begin, 0, 1.0)[0].message == m.BusyReply(*NAMES_TO_P, 0.7)


def test_drained_waits_for_the_copy_under_way():
    core, transfer = receiver_in(R.DRAINING)
    assert core.cancel(KEY, "again", 0.0) == []
    drained = [action.event.key for action in core.wrote(KEY, 0, True, 0.1) if isinstance(action, Emit)]
    assert drained == [KEY, KEY]  # one for each call of cancel
    assert transfer.state is R.FREED
    assert core.table.credit.outstanding_bytes == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"digest": bytes(16)},
        {"chunks": 0},
        {"finish": "nonsense"},
    ],
)
def test_commit_that_does_not_match_is_refused(bad):
    core, transfer = receiver_in(R.GRANTED)
    core.receive(chunk_message(), WHOLE.nbytes(LAYOUT), 0.0)
    core.wrote(KEY, 0, True, 0.0)
    core.receive(commit_message(**bad), 0, 0.1)
    assert transfer.state is R.FREED


@pytest.mark.parametrize(
    ("pieces", "after"),
    [
        ([Slice(0, 70, 0, 1, 0, 2), Slice(0, 70, 0, 1, 0, 2)], R.FREED),  # the same layer twice, the other never
        ([Slice(0, 70, 0, 2, 1, 2), Slice(0, 70, 0, 2, 1, 2)], R.FREED),  # the same head twice
        ([Slice(0, 70, 0, 2, 1, 2), Slice(0, 70, 0, 2, 0, 1)], R.COMMITTED),
    ],
)
def test_chunks_must_tile_the_prompt(pieces, after):
    core, transfer = receiver_in(R.GRANTED)
    for seq, piece in enumerate(pieces):
        core.receive(chunk_message(seq, piece), piece.nbytes(LAYOUT), 0.0)
        core.wrote(KEY, seq, True, 0.0)
    core.receive(commit_message(chunks=2, digest=digest((CRC, piece) for piece in pieces)), 0, 0.1)
    assert transfer.state is after


def test_a_head_range_that_is_none_ends_the_transfer_with_words():
    for heads in ((0, 3), (1, 1), (2, 1), (2, 3)):
        core, transfer = receiver_in(R.RECEIVING)
        actions = core.receive(chunk_message(1, Slice(64, 70, 0, 2, *heads)), 48, 0.1)
        said = [action.message for action in actions if isinstance(action, Send)]
        assert said == [m.Abort(*NAMES_TO_P, "chunk 1 lies outside what was granted")]
        assert [action.event.reason for action in actions if isinstance(action, Emit)] == [said[0].reason]
        assert transfer.state is R.FREED


def test_sender_beyond_its_credit_is_stopped():
    core = ReceiverCore(end(D), Timers(), Limits(window_bytes=512, chunk_bytes=256, max_chunk_bytes=256), Counters())
    core.receive(compat.hello(end(P), D), 0, 0.0)
    core.expect(KEY, BOUND, 0.0)
    core.receive(m.Begin(*NAMES_TO_D, 70, BOUND.chain, BOUND.prompt, 1), 0, 0.0)
    grant = core.grant(KEY, ["p"], 0, 0.0)[-1].message
    assert grant.credit == 512
    transfer = core.table.live[KEY]
    core.receive(chunk_message(), WHOLE.nbytes(LAYOUT), 0.0)
    assert transfer.state is R.FREED


def test_short_transfers_overtake_long_ones_but_never_starve_them():
    core = SenderCore(end(P), Timers(), Limits(chunk_bytes=64), Counters())
    bound = {"long": Binding.of(list(range(640)), b"k"), "short": BOUND}
    for name in ("long", "short"):
        core.begin((name, 1), PEER, bound[name], ["p"], 0.0)
    core.receive("addr", compat.hello_ack(end(D), P, "", 1 << 20), 0.0)
    for name in ("long", "short"):
        core.receive("addr", m.Grant(D, P, name, 1, 0, 1 << 20, 30.0), 0.0)
        core.ready((name, 1), 1000, None)
    order = []
    for _ in range(80):
        chosen = core.next_chunk("addr")
        assert chosen is not None
        order.append(chosen[1].key[0])
        core.sent(*chosen, CRC, True, 0.0)
    assert order[:40].count("short") == 30  # three of four go to the one with less left
    assert order[-1] == "long"


def test_endpoint_that_fits_no_hello_is_refused_at_once():
    for facts in ({"incarnation": ""}, {"fingerprint": "f" * 2000}, {"fingerprint_fields": {"x" * 70: "y"}}):
        with pytest.raises(ValueError, match="too long"):
            Endpoint(**({"incarnation": "i", "fingerprint": "f", "fingerprint_fields": {}, "layout": LAYOUT} | facts))
