"""The messages of the KV channel and their wire form: an 8-byte xxh3 of the header, then the header in msgpack.

Owns: every field, its limits, and the one error a bad message gives. A payload (CHUNK, PROBE) is a second frame.
Must not: know states, sockets or clocks. Decoding arbitrary bytes costs bounded memory and raises only
`MalformedMessage`. Fields may be appended in a later version: unknown trailing ones are ignored.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import xxhash
from msgspec import Meta

from lanewise.policy.blocks import DIGEST_BYTES, UNIT_TOKENS, KVLayout
from lanewise.transfer.chunks import Slice
from lanewise.transfer.neighbour import MAX_RUNS, RUN_BYTES
from lanewise.transfer.records import MAX_FIELD, MAX_FIELDS, MAX_NAME, MAX_PROMPT_TOKENS, Key
from lanewise.transfer.word_sum import word_sum

PROTOCOL = 3
"""Major version: part of HELLO, and of what must be equal. 2: a chunk is of any range of heads, as the digest says.
3: several messages may come as one of ZeroMQ (bundles.py)."""

MAX_HEADER_BYTES = 1 << 20
MAX_TOKENS = MAX_PROMPT_TOKENS
MAX_CHUNKS = 1 << 20
MAX_REASON = 2000
MAX_LIVE = 1024
MAX_TOP = 256
MAX_WAIT_S = 86400.0
_CHECK_BYTES = 8

Incarnation = Annotated[str, Meta(min_length=1, max_length=64)]
RequestId = Annotated[str, Meta(min_length=1, max_length=128)]
Epoch = Annotated[int, Meta(ge=0, le=1 << 31)]
Reason = Annotated[str, Meta(max_length=MAX_REASON)]
Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Layer = Annotated[int, Meta(ge=0, le=1 << 16)]
Count = Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
Seconds = Annotated[float, Meta(ge=0, le=MAX_WAIT_S)]
Check = Annotated[bytes, Meta(min_length=_CHECK_BYTES, max_length=_CHECK_BYTES)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Chain = Annotated[bytes, Meta(max_length=MAX_TOKENS // UNIT_TOKENS * DIGEST_BYTES)]
ShortText = Annotated[str, Meta(max_length=MAX_NAME)]
Fields = Annotated[dict[ShortText, Annotated[str, Meta(max_length=MAX_FIELD)]], Meta(max_length=MAX_FIELDS)]
Seqs = Annotated[tuple[Count, ...], Meta(max_length=256)]
KeyList = Annotated[tuple[tuple[RequestId, Epoch], ...], Meta(max_length=MAX_LIVE)]
Top = Annotated[tuple[tuple[int, float], ...], Meta(max_length=MAX_TOP)]
Runs = Annotated[bytes, Meta(max_length=MAX_RUNS * RUN_BYTES)]
"""Parts of the sender's memory (neighbour.py) that hold the payload, which is then not in the message."""


class MalformedMessage(ValueError):
    """Bytes that are not a message of this protocol."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Every message names the incarnation it comes from and the one it is meant for."""

    src: Incarnation
    dst: Incarnation


class TransferMessage(Message, frozen=True, array_like=True):
    request_id: RequestId
    epoch: Epoch

    @property
    def key(self) -> Key:
        return (self.request_id, self.epoch)


class WireLayout(msgspec.Struct, frozen=True, array_like=True):
    num_layers: Layer
    num_kv_heads: Layer
    head_dim: Layer
    dtype: ShortText
    dtype_bytes: Layer
    encoding: ShortText = "Native"

    @classmethod
    def of(cls, layout: KVLayout) -> WireLayout:
        shape = (layout.num_layers, layout.num_kv_heads, layout.head_dim)
        return cls(*shape, layout.dtype, layout.dtype_bytes, layout.encoding)


class Hello(Message, tag="HELLO", frozen=True, array_like=True):
    protocol: int
    fingerprint: Annotated[str, Meta(max_length=MAX_FIELD)]
    fields: Fields
    layout: WireLayout


class HelloAck(Message, tag="HELLO_ACK", frozen=True, array_like=True):
    protocol: int
    fingerprint: Annotated[str, Meta(max_length=MAX_FIELD)]
    fields: Fields
    layout: WireLayout
    refusal: Reason  # empty: accepted
    max_chunk_bytes: Annotated[int, Meta(ge=1, le=1 << 26)]
    data_port: Annotated[int, Meta(ge=0, le=65535)] = 0  # of the same host; 0: data goes to the control address
    data_token: Annotated[bytes, Meta(max_length=64)] = b""
    group_port: Annotated[int, Meta(ge=0, le=65535)] = 0  # where process groups meet; 0: it has none
    direct_port: Annotated[int, Meta(ge=0, le=65535)] = 0  # for plain TCP connections; 0: it takes none
    direct_token: Annotated[bytes, Meta(max_length=64)] = b""
    place: Annotated[bytes, Meta(max_length=64)] = b""  # whose processes' memory it can read; empty: of none


class Join(Message, tag="JOIN", frozen=True, array_like=True):
    """The sender opens a process group for data of this link; chunks come by it from now on."""

    group: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]  # never used before


class Stale(Message, tag="NACK_STALE", frozen=True, array_like=True):
    """Somebody else lives at this address now."""

    wanted: Incarnation


class Probe(Message, tag="PROBE", frozen=True, array_like=True):
    nonce: Annotated[int, Meta(ge=0, le=1 << 62)]
    crc: Check
    runs: Runs = b""


class ProbeAck(Message, tag="PROBE_ACK", frozen=True, array_like=True):
    nonce: Annotated[int, Meta(ge=0, le=1 << 62)]
    crc: Check  # as the receiver computed it


class Begin(TransferMessage, tag="BEGIN", frozen=True, array_like=True):
    tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    chain: Chain
    prompt: Digest
    nbytes: Bytes
    mac_key: Annotated[bytes, Meta(max_length=32)] = b""  # of its chunks, where data is not encrypted


class Grant(TransferMessage, tag="GRANT", frozen=True, array_like=True):
    have_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS, multiple_of=UNIT_TOKENS)]
    credit: Bytes  # total bytes the sender may have sent since BEGIN: absolute, so a lost or doubled one is harmless
    lease_s: Seconds


class BusyReply(TransferMessage, tag="BUSY", frozen=True, array_like=True):
    retry_after_s: Seconds


class Nack(TransferMessage, tag="NACK", frozen=True, array_like=True):
    reason: Reason
    hello_first: bool = False  # the receiver does not know this sender (any more)


class Chunk(TransferMessage, tag="CHUNK", frozen=True, array_like=True):
    seq: Count
    layer_lo: Layer
    layer_hi: Layer
    token_lo: Tokens
    token_hi: Tokens
    head_lo: Layer
    head_hi: Layer
    crc: Check  # of the payload frame
    mac: Annotated[bytes, Meta(max_length=16)] = b""  # over this header without it, and the payload
    runs: Runs = b""
    words: bool = False  # the checksum is `word_sum`'s, as a GPU computes it, and not xxh3

    @property
    def slice(self) -> Slice:
        return Slice(self.token_lo, self.token_hi, self.layer_lo, self.layer_hi, self.head_lo, self.head_hi)


class Ack(TransferMessage, tag="ACK", frozen=True, array_like=True):
    cumulative: Count  # chunks 0..cumulative-1 are in place
    bitmap: Annotated[bytes, Meta(max_length=MAX_CHUNKS // 8)]  # bit i: chunk cumulative + i
    credit: Bytes  # absolute, as in GRANT
    bad: Seqs = ()  # arrived damaged: send again at once


class Commit(TransferMessage, tag="COMMIT", frozen=True, array_like=True):
    chunks: Count
    digest: Digest
    tokens: Tokens
    prompt: Digest
    index: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    token_id: Annotated[int, Meta(ge=0, le=1 << 32)]
    logprob: float | None
    top: Top
    finish: Annotated[str, Meta(max_length=32)] | None


class CommitAck(TransferMessage, tag="COMMIT_ACK", frozen=True, array_like=True):
    pass


class Abort(TransferMessage, tag="ABORT", frozen=True, array_like=True):
    reason: Reason


class AbortAck(TransferMessage, tag="ABORT_ACK", frozen=True, array_like=True):
    drained: bool  # no copy of this transfer is under way


class Ping(Message, tag="PING", frozen=True, array_like=True):
    live: KeyList


class Pong(Message, tag="PONG", frozen=True, array_like=True):
    live: KeyList  # those of the PING that are known here; all others are gone
    hello_first: bool = False


FromSender = Hello | Join | Probe | Begin | Chunk | Commit | Abort | AbortAck | Ping
FromReceiver = HelloAck | Stale | ProbeAck | Grant | BusyReply | Nack | Ack | CommitAck | Abort | AbortAck | Pong
AnyMessage = FromSender | FromReceiver

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def kind(message: AnyMessage) -> str:
    """The word of docs/kv-channel.md for this message."""
    return str(type(message).__struct_config__.tag)


def encode(message: AnyMessage) -> bytes:
    body = _encoder.encode(message)
    return checksum(body) + body


def decode(frame: bytes | memoryview) -> AnyMessage:
    if not _CHECK_BYTES < len(frame) <= MAX_HEADER_BYTES:
        raise MalformedMessage(f"header of {len(frame)} bytes")
    body = frame[_CHECK_BYTES:]
    if checksum(body) != bytes(frame[:_CHECK_BYTES]):
        raise MalformedMessage("header checksum")
    try:
        return _decoder.decode(body)
    # A valid checksum proves nothing about the author, and msgspec lets these three through beside its own error.
    except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError) as error:
        raise MalformedMessage(str(error)) from None


def checksum(data: bytes | memoryview, *more: bytes | memoryview) -> bytes:
    """xxh3 of 64 bits, of all parts as if they were one; releases the GIL, about 30 GB/s on one core."""
    if not more:
        return xxhash.xxh3_64_digest(data)
    state = xxhash.xxh3_64(data)
    update = state.update
    for part in more:
        update(part)
    return state.digest()


def chunk_checksum(words: bool, data: bytes | memoryview, *more: bytes | memoryview) -> bytes:
    """As a CHUNK says it; where it is of `words`, ValueError if these are no whole ones."""
    if words:
        return word_sum(b"".join((data, *more)) if more else data)
    return checksum(data, *more)


def clip(reason: str) -> str:
    """A reason that fits its field."""
    return reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 1] + "…"
