"""One link from a prefill worker to one decode incarnation: HELLO, the synthetic block, PING. Pure.

Owns: the walk through `LINK_NEXT`, what was measured, and when the partner counts as dead.
Must not: know transfers (the core stops them when a link fails) or sockets.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lanewise.fleet import Link, LinkState
from lanewise.transfer import compat
from lanewise.transfer import messages as m
from lanewise.transfer.protocol import LINK_NEXT, Action, Emit, Entered, LinkInput, LinkPhase, Send, SendProbe
from lanewise.transfer.records import Endpoint, Limits, LinkReport, Peer, Timers

_NEVER = float("inf")
_LATENCY_PROBE_BYTES = 64


@dataclass(slots=True)
class _Outstanding:
    nonce: int
    crc: bytes
    stripe: int
    payload: bytes
    sent_at: float


class LinkMachine:
    def __init__(self, peer: Peer, identity: Endpoint, timers: Timers, limits: Limits) -> None:
        self.peer = peer
        self.phase = LinkPhase.FAILED
        self.reason = ""
        self.hopeless = False
        """Fingerprints differ or the incarnation is gone: greeting again cannot help."""
        self.mismatch = False
        self.chunk_bytes = limits.chunk_bytes
        self.referred_bytes = limits.chunk_bytes
        self._identity = identity
        self._timers = timers
        self._limits = limits
        self._random = random.Random(
            f"{identity.incarnation}/{peer.incarnation}"
        )  # contents of test blocks, nothing secret
        self._tries = 0
        self._at = _NEVER  # when the current wait ends
        self._wanted_at = 0.0
        self._probe: _Outstanding | None = None
        self._latency_s = self._block_s = self._bandwidth = self._own_bandwidth = 0.0
        self._misses = 0
        self._ping_at = _NEVER

    @property
    def usable(self) -> bool:
        return self.phase in (LinkPhase.PROBING, LinkPhase.UP)

    @property
    def deadline(self) -> float:
        return min(self._at, self._ping_at)

    def forgettable(self, now: float) -> bool:
        return self.phase is LinkPhase.FAILED and (self.hopeless or now >= self._wanted_at + self._timers.forget_link_s)

    def want(self, now: float) -> list[Action]:
        """Somebody needs this link: greet, unless that is done or under way."""
        self._wanted_at = now
        return self._greet(now) if self.phase is LinkPhase.FAILED else []

    def connect(self, now: float) -> list[Action]:
        """As `want`; what is already known is reported once more, since whoever asks may have forgotten it."""
        actions = self.want(now)
        return [*actions, self._report(LinkState.VERIFIED)] if self.phase is LinkPhase.UP else actions

    def again(self, now: float) -> list[Action]:
        """The partner has forgotten us."""
        return self._greet(now) if self.usable else []

    def fail(self, reason: str, now: float, *, hopeless: bool = False, mismatch: bool = False) -> list[Action]:
        actions = self._enter(LinkInput.FAIL)
        if not actions:
            return []
        self.reason, self.hopeless, self.mismatch = reason, hopeless, mismatch
        self._probe = None
        self._ping_at = _NEVER
        self._at = _NEVER if hopeless else now + self._timers.rehello_s
        return [*actions, self._report(LinkState.FAILED)]

    # --- messages

    def receive(self, message: m.AnyMessage, now: float) -> list[Action]:
        self._misses = 0
        match message:
            case m.HelloAck():
                return self._greeted(message, now)
            case m.ProbeAck():
                return self._proved(message, now)
            case m.Pong(hello_first=True):
                return self.again(now)
            case _:
                return []

    def _greeted(self, ack: m.HelloAck, now: float) -> list[Action]:
        if self.phase is not LinkPhase.HELLO:
            return []
        refusal = ack.refusal or compat.differences(self._identity, ack)
        if refusal:
            return self.fail(f"decode worker refuses: {refusal}", now, hopeless=True, mismatch=True)
        self.chunk_bytes = min(self._limits.chunk_bytes, ack.max_chunk_bytes)
        self.referred_bytes = min(self._limits.referred_bytes, ack.max_chunk_bytes)
        self._tries = 0
        self._block_s = 0.0
        self._ping_at = now + self._timers.ping_s
        return [*self._enter(LinkInput.ACCEPTED), self._send_probe(0, _LATENCY_PROBE_BYTES, now)]

    def _send_probe(self, stripe: int, size: int, now: float) -> Action:
        payload = self._random.randbytes(size)
        nonce = self._random.getrandbits(62)
        self._probe = _Outstanding(nonce, m.checksum(payload), stripe, payload, now)
        return self._probe_again(now)

    def _probe_again(self, now: float) -> Action:
        probe = self._probe
        assert probe is not None
        probe.sent_at = now
        self._tries += 1
        self._at = now + self._timers.hello_s
        message = m.Probe(self._identity.incarnation, self.peer.incarnation, probe.nonce, probe.crc)
        return SendProbe(self.peer.kv_address, probe.stripe, message, probe.payload)

    def _proved(self, ack: m.ProbeAck, now: float) -> list[Action]:
        """Three steps: a small block for latency, then a large one on every stripe for bandwidth."""
        probe = self._probe
        if self.phase is not LinkPhase.PROBING or probe is None or ack.nonce != probe.nonce:
            return []
        if ack.crc != probe.crc:
            return self.fail(f"the test block was damaged on stripe {probe.stripe}", now)
        self._tries = 0
        taken = max(now - probe.sent_at, 1e-6)
        size = min(self._limits.probe_bytes, self.chunk_bytes)
        if len(probe.payload) == _LATENCY_PROBE_BYTES:
            self._latency_s = taken / 2
            return [self._send_probe(0, size, now)]
        self._block_s += max(taken - 2 * self._latency_s, taken / 10)
        if probe.stripe + 1 < self._limits.stripes:
            return [self._send_probe(probe.stripe + 1, size, now)]
        self._probe = None
        self._at = _NEVER
        self._bandwidth = size * self._limits.stripes / self._block_s
        return [*self._enter(LinkInput.PROVED), self._report(LinkState.VERIFIED)]

    def measured(self, num_bytes: int, seconds: float) -> list[Action]:
        """Data has a way of its own, beside the sockets that are tested here; it moves a block in so long."""
        self._own_bandwidth = num_bytes / seconds
        return [self._report(LinkState.VERIFIED)] if self.phase is LinkPhase.UP else []

    # --- time

    def ping_due(self, now: float) -> bool:
        """Whether to PING now; the core sends it, since it knows which transfers live."""
        if now < self._ping_at or self._misses >= self._timers.ping_misses:
            return False
        self._misses += 1
        self._ping_at = now + self._timers.ping_s
        return True

    def tick(self, now: float) -> list[Action]:
        if now >= self._ping_at and self._misses >= self._timers.ping_misses:
            return self.fail(f"no answer to {self._misses} PINGs", now)
        if now < self._at:
            return []
        if self.phase is LinkPhase.FAILED:
            return self._greet(now)
        if self._tries >= self._timers.hello_tries:
            what = "HELLO" if self.phase is LinkPhase.HELLO else "PROBE"
            return self.fail(f"no answer to {self._tries} {what}s", now)
        return [self._hello(now)] if self.phase is LinkPhase.HELLO else [self._probe_again(now)]

    def _greet(self, now: float) -> list[Action]:
        actions = self._enter(LinkInput.RETRY)
        self._tries = self._misses = 0
        self._probe = None
        self._ping_at = _NEVER
        self.hopeless = self.mismatch = False
        return [*actions, self._hello(now)]

    def _hello(self, now: float) -> Action:
        self._tries += 1
        self._at = now + self._timers.hello_s
        return Send(self.peer.kv_address, compat.hello(self._identity, self.peer.incarnation))

    def _report(self, state: LinkState) -> Emit:
        good = state is LinkState.VERIFIED
        measured = (self._own_bandwidth or self._bandwidth, self._latency_s) if good else (0.0, 0.0)
        return Emit(LinkReport(Link(self.peer.incarnation, state, "" if good else self.reason, *measured)))

    def _enter(self, event: LinkInput) -> list[Action]:
        after = LINK_NEXT.get((self.phase, event))
        if after is None:
            return []
        self.phase = after
        return [Entered(f"link.{after}")]
