"""Plain records of the KV channel: who the two sides are, what they may do, what they report.

Owns: identities, settings, timers, the page-store interface, events to the worker's loop and counters.
Must not: hold protocol state, touch sockets or read a clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lanewise.fleet import Link
from lanewise.policy.blocks import KVLayout, chain_hashes, prompt_hash
from lanewise.request import Partner, Token

if TYPE_CHECKING:
    from lanewise.transfer.ipc_link import Device

MIB = 1024 * 1024

Key = tuple[str, int]
"""(request_id, epoch): the name of one transfer."""

Peer = Partner
"""A decode worker as the loop knows it: its KV address and its incarnation."""

Pages = Any
"""Whatever the local pool uses to name a sequence's pages; the channel passes it back to the store unread."""


MAX_PROMPT_TOKENS = 1 << 21
MAX_NAME = 64
MAX_FIELD = 1024
MAX_FIELDS = 64


def checked_key(key: Key) -> Key:
    """A key that fits the wire, or ValueError."""
    request_id, epoch = key
    if not 1 <= len(request_id) <= 128 or not 0 <= epoch <= 1 << 31:
        raise ValueError(f"not the name of a transfer: {key!r}")
    return request_id, epoch


def packed_ids(ids: Sequence[int]) -> array[int]:
    """Token ids as 32-bit unsigned numbers; ValueError where they are not, or where their number is impossible."""
    if not 1 <= len(ids) <= MAX_PROMPT_TOKENS:
        raise ValueError(f"a prompt of {len(ids)} tokens")
    try:
        return array("I", ids)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids: {error}") from None


class PageStore(Protocol):
    """A KV pool, as the channel sees it. Its methods run in the transfer thread."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def device_memory(self) -> Device | None:
        """The memory of a GPU in which the KV lies, where processes of this host may have it from there."""

    @property
    def head_shards(self) -> int:
        """So many processes hold the KV, an equal part of the heads each; 1: all of it is here."""

    def read(
        self, pages: Pages, tokens: range, layers: range, heads: range, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Bytes of these tokens, layers and heads in wire order, copied into `out` (contiguous, of exactly their size)
        or a new array; never a view of the pool."""

    def write(self, pages: Pages, tokens: range, layers: range, heads: range, data: memoryview) -> None:
        """The inverse of `read`. `data` is borrowed for the duration of the call."""

    def views(self, pages: Pages, tokens: range, layers: range, heads: range) -> list[memoryview] | None:
        """What `read` copies, writable, where it lies; None where that is not in this process's memory, or where the
        heads of one token do not lie beside those of the next. The list may know addresses: `neighbour.areas_of`."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a worker is to its partners."""

    incarnation: str
    fingerprint: str
    fingerprint_fields: Mapping[str, str]
    layout: KVLayout

    def __post_init__(self) -> None:
        """What does not fit a HELLO must fail here, not as silence of the partner."""
        fields = self.fingerprint_fields
        fits = 1 <= len(self.incarnation) <= MAX_NAME and len(self.fingerprint) <= MAX_FIELD
        fits &= len(fields) <= MAX_FIELDS and all(len(k) <= MAX_NAME and len(v) <= MAX_FIELD for k, v in fields.items())
        if not fits:
            raise ValueError("incarnation, fingerprint or its fields are too long for the KV channel")


@dataclass(frozen=True, slots=True)
class Binding:
    """What ties KV to the token ids it was computed from; both sides make it from their own ids."""

    tokens: int
    chain: bytes  # all unit hashes, concatenated
    prompt: bytes

    @classmethod
    def of(cls, ids: Sequence[int], cache_key: bytes) -> Binding:
        return cls(len(ids), b"".join(chain_hashes(ids, cache_key)), prompt_hash(ids, cache_key))


@dataclass(frozen=True, slots=True)
class Timers:
    """Every wait of the protocol, in seconds. Tests shrink them; production uses these."""

    hello_s: float = 2.0
    hello_tries: int = 3
    rehello_s: float = 5.0
    """Pause before a failed link greets its partner again, so that no healthy partner stays shut out."""
    forget_link_s: float = 120.0
    """A link that nobody asked for again and that failed for this long is closed."""
    grant_wait_s: float = 5.0
    begin_resend_s: float = 0.5
    hold_begin_s: float = 5.0
    ack_resend_s: float = 2.0
    ack_abort_s: float = 5.0
    commit_ack_s: float = 0.5
    commit_tries: int = 12
    abort_ack_s: float = 2.0
    abort_tries: int = 3
    lease_s: float = 30.0
    ping_s: float = 2.0
    ping_misses: int = 3
    tombstone_s: float = 120.0

    @property
    def shortest_s(self) -> float:
        """No wait that begins now can end before so much time has passed."""
        waits: list[float] = [value for name, value in asdict(self).items() if name.endswith("_s")]
        return min(waits)

    @property
    def dead_s(self) -> float:
        """Silence after which a partner that should ping counts as dead."""
        return self.ping_s * (self.ping_misses + 1)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes. Credit bounds the bytes on their way to one receiver, whatever the number of senders."""

    chunk_bytes: int = 4 * MIB  # Python costs the same per chunk, whatever its size
    referred_bytes: int = 32 * MIB  # a chunk of which only the place is sent: Python is all that it costs the sender
    max_chunk_bytes: int = 32 * MIB  # that a receiver takes; a sender uses the smaller of its own and the partner's
    stripes: int = 1
    window_bytes: int = 64 * MIB
    credit_bytes: int = 512 * MIB
    probe_bytes: int = MIB
    least_piece_bytes: int = 16384  # a chunk in smaller pieces, on average, is gathered: each costs as much as its copy
    control_hwm: int = 1000
    data_hwm: int = 8
    queue_messages: int = 1000
    """Control messages kept per partner while its socket takes none; more are dropped and the timers resend."""
    max_transfers: int = 4096
    max_held: int = 256
    max_peers: int = 1024
    max_handshakes: int = 64
    """Connections that may be open without having shown a key; the oldest is cut off for the next."""

    def __post_init__(self) -> None:
        if not 1 <= self.stripes <= 4:
            raise ValueError(f"stripes must be 1 to 4, not {self.stripes}")
        if not 0 < self.chunk_bytes <= self.max_chunk_bytes <= 32 * MIB:
            raise ValueError("0 < chunk_bytes <= max_chunk_bytes <= 32 MiB does not hold")


@dataclass(slots=True)
class Counters:
    """What has happened since the start. The transfer thread writes it; `snapshot()` of a side returns a copy."""

    bytes_sent: int = 0
    bytes_received: int = 0
    chunks_sent: int = 0
    chunks_resent: int = 0
    chunks_referred: int = 0  # which the decode worker read from this process's memory
    chunks_corrupt: int = 0
    chunks_refused: int = 0  # of no live transfer
    delivered: int = 0
    committed: int = 0
    aborted: int = 0
    busy: int = 0
    refused: int = 0
    drained: int = 0
    prefix_skipped_tokens: int = 0
    stale: int = 0
    malformed: int = 0
    forged: int = 0  # chunks whose MAC was not that of their transfer
    refused_connections: int = 0  # of strangers, or cut off before they had said who they are
    dropped: int = 0  # control messages that found no room or no peer
    internal_errors: int = 0  # anything but 0 is a defect


# Events. Each transfer ends, on each side, in exactly one of those marked "end"; from then on the channel does not
# touch its pages.


@dataclass(frozen=True, slots=True)
class Granted:
    key: Key
    have_tokens: int


@dataclass(frozen=True, slots=True)
class Busy:
    """End: the decode side has no room now."""

    key: Key
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Sent:
    """All bytes have been handed to the network and COMMIT went out; the pages are still needed."""

    key: Key
    bytes: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """End: the decode side has verified and taken everything."""

    key: Key


@dataclass(frozen=True, slots=True)
class Aborted:
    """End: no KV of this transfer is or will be used."""

    key: Key
    reason: str
    fingerprint_mismatch: bool = False


@dataclass(frozen=True, slots=True)
class LinkReport:
    link: Link


@dataclass(frozen=True, slots=True)
class Offered:
    """A verified sender has KV for an expected prompt; answer with `grant` or `refuse`."""

    key: Key
    tokens: int


@dataclass(frozen=True, slots=True)
class Committed:
    """End: the pages hold the whole prompt's KV, verified."""

    key: Key
    token: Token
    received_tokens: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class Drained:
    """End after `cancel`: no copy of this transfer is under way and none will start."""

    key: Key


SenderEvent = Granted | Busy | Sent | Delivered | Aborted | LinkReport
ReceiverEvent = Offered | Committed | Aborted | Drained
