"""What is known of the workers at one instant: identity, statistics, links, and the immutable snapshot of them all.

Owns: the records on which routing, lanes and scaling decide.
Must not: fetch anything, read a clock, or keep mutable state (the router's discovery and dispatch do).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Lane(StrEnum):
    """Class of requests by predicted prefill work that a prefill instance prefers."""

    ANY = "any"
    SHORT = "short"
    LONG = "long"


class LinkState(StrEnum):
    UNTESTED = "untested"
    VERIFIED = "verified"  # HELLO and one synthetic block have passed
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """What a worker says of itself once per process (`Worker.Describe`, `welcome`)."""

    role: Role
    name: str
    incarnation: str  # UUID drawn at process start
    address: str  # gRPC host:port
    kv_address: str  # ZeroMQ endpoint; empty on prefill workers
    model: str  # served name
    fingerprint: str  # hash of `fingerprint_fields`
    fingerprint_fields: Mapping[str, str]
    max_context_tokens: int
    kv_capacity_tokens: int
    vocab_size: int
    device: str
    pid: int
    kv_bytes_per_token: int = 0  # 0: not told
    power_watts: int = 0  # most its GPU may draw; 0: not known


@dataclass(frozen=True, slots=True)
class Link:
    """State of the KV path from a prefill worker to one decode incarnation, as the prefill worker measured it."""

    peer: str  # decode incarnation
    state: LinkState
    reason: str = ""
    bandwidth_bytes_per_s: float = 0.0
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """Sent after each batch and at least every 100 ms. Tokens are uncached prompt tokens unless said otherwise."""

    queued_requests: int = 0
    queued_tokens: int = 0  # waiting; without those of the batch that runs
    running_requests: int = 0  # decoding
    running_context_tokens: int = 0
    kv_used_tokens: int = 0  # referenced + granted but uncommitted
    kv_capacity_tokens: int = 0
    kv_cached_tokens: int = 0  # evictable prefix cache
    decode_step_s: float = 0.0  # recent mean step time, but for the longest
    queue_wait_s: float = 0.0  # what is left of the running batch, predicted
    cost: Mapping[str, float] = field(default_factory=dict)  # fitted cost-model coefficients, see policy/cost.py
    lane: Lane = Lane.ANY
    lane_generation: int = 0
    lane_age_s: float = 0.0  # since the last move
    draining: bool = False
    links: tuple[Link, ...] = ()
    transfers: int = 0
    preemptions: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)  # totals of the KV channel since the start
    leaked_blocks: int = 0  # result of the last idle audit; anything but 0 is a defect
    drain_eta_s: float = 0.0  # predicted time until everything it holds has ended
    handover: bool = False  # it drains, and waits for another pair to take its streams
    routers: int = 0  # sessions that are open
    cost_batches: int = 0  # that `cost` was fitted to; 0: it is the model the worker started with


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as one router sees it: its last word plus what this router sent since."""

    identity: WorkerIdentity
    stats: WorkerStats
    ready: bool  # connected, welcomed, not draining
    inflight_requests: int = 0  # submitted by this router and not yet counted in `stats`
    inflight_tokens: int = 0  # uncached tokens submitted by this router since `stats` was taken


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """All workers of one service at one instant, in a stable order (by name, then incarnation)."""

    prefill: tuple[WorkerView, ...] = ()
    decode: tuple[WorkerView, ...] = ()

    def link(self, prefill: str, decode: str) -> LinkState:
        """State of the KV path between two incarnations (UNTESTED where the prefill worker has not reported it)."""
        for view in self.prefill:
            if view.identity.incarnation == prefill:
                for link in view.stats.links:
                    if link.peer == decode:
                        return link.state
        return LinkState.UNTESTED


@dataclass(frozen=True, slots=True)
class Pair:
    """Where one attempt of a request runs. `prefill is None` means: prefill locally on `decode`."""

    prefill: str | None  # incarnation
    decode: str  # incarnation
    predicted_ttft_s: float
    reason: str  # one line for `lanewise explain`
    other_ttft_s: float | None = None  # predicted for the other way: local where this is remote, and the reverse
