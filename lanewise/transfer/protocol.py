"""States, inputs and the two transition tables of the KV channel, and the actions its machines return. Pure.

Owns: `SENDER_NEXT`, `RECEIVER_NEXT` and `LINK_NEXT`: a (state, input) pair that is not in a table changes nothing,
so a duplicate, late or senseless message is harmless by construction.
Must not: read a clock (`now` is an argument everywhere), do I/O, or compute a checksum of page bytes.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from lanewise.transfer.chunks import Slice
from lanewise.transfer.messages import AnyMessage, Probe
from lanewise.transfer.records import Key, Pages, ReceiverEvent, SenderEvent


class SenderState(StrEnum):
    QUEUED = "queued"  # waits for the link
    OFFERED = "offered"  # BEGIN sent
    STREAMING = "streaming"
    AWAIT_ACK = "await_ack"  # everything and COMMIT sent
    RELEASED = "released"  # end: COMMIT_ACK
    ABORTED = "aborted"  # end


class SenderInput(StrEnum):
    LINK_UP = "link_up"
    HELLO_FIRST = "hello_first"
    GRANT = "grant"
    REFUSED = "refused"  # BUSY or NACK
    ALL_SENT = "all_sent"
    COMMIT_ACK = "commit_ack"
    FAIL = "fail"  # local abort, peer's ABORT, a timer, a lost or stale link


_S, _SI = SenderState, SenderInput
SENDER_NEXT: dict[tuple[SenderState, SenderInput], SenderState] = {
    (_S.QUEUED, _SI.LINK_UP): _S.OFFERED,
    (_S.QUEUED, _SI.FAIL): _S.ABORTED,
    (_S.OFFERED, _SI.HELLO_FIRST): _S.QUEUED,
    (_S.OFFERED, _SI.GRANT): _S.STREAMING,
    (_S.OFFERED, _SI.REFUSED): _S.ABORTED,
    (_S.OFFERED, _SI.FAIL): _S.ABORTED,
    (_S.STREAMING, _SI.ALL_SENT): _S.AWAIT_ACK,
    (_S.STREAMING, _SI.FAIL): _S.ABORTED,
    (_S.AWAIT_ACK, _SI.COMMIT_ACK): _S.RELEASED,
    (_S.AWAIT_ACK, _SI.FAIL): _S.ABORTED,
}


class ReceiverState(StrEnum):
    EXPECTED = "expected"  # Submit came, BEGIN did not
    HELD = "held"  # BEGIN came, Submit did not
    OFFERED = "offered"  # both, and they agree; the loop decides
    GRANTED = "granted"
    RECEIVING = "receiving"
    VERIFYING = "verifying"  # COMMIT came; waits for missing chunks
    COMMITTED = "committed"  # end
    DRAINING = "draining"  # given up; a copy may be under way
    FREED = "freed"  # end


class ReceiverInput(StrEnum):
    BEGIN = "begin"
    EXPECT = "expect"
    GRANT = "grant"
    CHUNK = "chunk"
    COMMIT = "commit"
    COMPLETE = "complete"  # all chunks in place, digest equal
    STOP = "stop"  # cancel, refusal, peer's ABORT, a timer, any contradiction
    DRAINED = "drained"


_R, _RI = ReceiverState, ReceiverInput
RECEIVER_NEXT: dict[tuple[ReceiverState, ReceiverInput], ReceiverState] = {
    (_R.EXPECTED, _RI.BEGIN): _R.OFFERED,
    (_R.HELD, _RI.EXPECT): _R.OFFERED,
    (_R.OFFERED, _RI.GRANT): _R.GRANTED,
    (_R.GRANTED, _RI.CHUNK): _R.RECEIVING,
    (_R.RECEIVING, _RI.CHUNK): _R.RECEIVING,
    (_R.VERIFYING, _RI.CHUNK): _R.VERIFYING,
    (_R.GRANTED, _RI.COMMIT): _R.VERIFYING,
    (_R.RECEIVING, _RI.COMMIT): _R.VERIFYING,
    (_R.VERIFYING, _RI.COMPLETE): _R.COMMITTED,
    (_R.DRAINING, _RI.DRAINED): _R.FREED,
} | {
    (state, _RI.STOP): _R.DRAINING
    for state in (_R.EXPECTED, _R.HELD, _R.OFFERED, _R.GRANTED, _R.RECEIVING, _R.VERIFYING)
}


class LinkPhase(StrEnum):
    HELLO = "hello"  # greeting sent
    PROBING = "probing"  # accepted; the synthetic block is on its way. Transfers may start
    UP = "up"
    FAILED = "failed"  # greets again after a pause, unless it never can succeed


class LinkInput(StrEnum):
    ACCEPTED = "accepted"
    PROVED = "proved"
    FAIL = "fail"
    RETRY = "retry"


_L, _LI = LinkPhase, LinkInput
LINK_NEXT: dict[tuple[LinkPhase, LinkInput], LinkPhase] = {
    (_L.HELLO, _LI.ACCEPTED): _L.PROBING,
    (_L.HELLO, _LI.FAIL): _L.FAILED,
    (_L.PROBING, _LI.PROVED): _L.UP,
    (_L.PROBING, _LI.FAIL): _L.FAILED,
    (_L.PROBING, _LI.RETRY): _L.HELLO,
    (_L.UP, _LI.FAIL): _L.FAILED,
    (_L.UP, _LI.RETRY): _L.HELLO,
    (_L.FAILED, _LI.RETRY): _L.HELLO,
}


# What a machine wants done. The drivers do it in order. Structs, since they cost a fifth of a frozen dataclass.


class Send(msgspec.Struct, frozen=True):
    """To the control socket of a partner: its address at the sender, its incarnation at the receiver."""

    to: str
    message: AnyMessage


class SendProbe(msgspec.Struct, frozen=True):
    to: str
    stripe: int
    probe: Probe
    payload: bytes


class Emit(msgspec.Struct, frozen=True):
    event: SenderEvent | ReceiverEvent


class Entered(msgspec.Struct, frozen=True):
    """A state was entered; a point for the fault hooks ("send.offered", "recv.granted")."""

    point: str


class Disconnect(msgspec.Struct, frozen=True):
    """Nothing uses this address any more."""

    address: str


class Write(msgspec.Struct, frozen=True):
    """Check the payload against the header's checksum and put it into the pages, then say so with `wrote`."""

    key: Key
    pages: Pages
    seq: int
    slice: Slice
    crc: bytes
    words: bool = False  # as in CHUNK


Action = Send | SendProbe | Emit | Entered | Disconnect | Write
