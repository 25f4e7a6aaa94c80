"""How long a batch takes: one formula for prefill and decode, with coefficients in seconds.

Owns: the cost model of docs/design.md §6–7 and its marginal form, used by batching, routing, admission, scaling and the
simulator alike. Must not: know models or devices by name (`profile.py`) or learn (`refit.py`); it is immutable.

    T_prefill = sqrt((compute·N)² + weights²) + elementwise·N + Σ max(attention·n(c + n/2), kv_read·(c + n))
              + head + comm + comm_token·N + launch + request·B
    T_decode  = the same with N = B, attention = kv_read·Σ context, and decode_request·B
N = new tokens in the batch, n and c = one request's new and cached tokens, B = requests in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import sqrt

USUAL_BATCH_TOKENS = 512  # by whose time the models of several workers are put in order


@dataclass(frozen=True)
class CostModel:
    """Coefficients of one model on one device. The defaults are a small model on one CPU core, to be refitted."""

    compute_s: float = 40e-6  # GEMM time of one new token
    weights_s: float = 1.5e-3  # reading all linear weights once
    elementwise_s: float = 0.0  # norms, activations and residuals of one new token
    attention_s: float = 4e-9  # per new token × token attended to
    kv_read_s: float = 40e-9  # reading one token of KV
    head_compute_s: float = 20e-6  # output head, per request that samples
    head_weights_s: float = 0.2e-3  # output head, once per batch that samples
    comm_s: float = 0.0  # all-reduce latency per batch
    comm_token_s: float = 0.0  # all-reduce bytes per new token
    launch_s: float = 1e-3  # fixed host cost of a batch
    request_s: float = 0.1e-3  # host cost per request of a prefill batch
    decode_request_s: float = 0.02e-3  # host cost per request of a decode step

    @cached_property
    def knee_tokens(self) -> float:
        """New tokens at which computing takes as long as reading the weights; below it, tokens are nearly free."""
        return self.weights_s / max(self.compute_s, 1e-12)

    @cached_property
    def token_s(self) -> float:
        """Marginal time of one new token in a large batch, attention excluded."""
        return self.compute_s + self.elementwise_s + self.comm_token_s

    @cached_property
    def start_s(self) -> float:
        """t0 of the bounds: what every request pays however well it is batched."""
        return self.launch_s + self.head_weights_s

    def attention(self, new: int, cached: int) -> float:
        """Attention time of one chunk: compute or the read of its KV, whichever is longer."""
        return max(self.attention_s * new * (cached + new / 2), self.kv_read_s * (cached + new))

    def work(self, new: int, cached: int) -> float:
        """Marginal work w: what no batch that holds these tokens can avoid (GEMM, elementwise, attention, request)."""
        return (
            self.compute_s * new
            + self.elementwise_s * new
            + self.attention_s * new * (cached + new / 2)
            + self.request_s
        )

    def batch(self, tokens: int, attention: float, finishing: int, requests: int) -> float:
        """Prefill batch time from its sums: new tokens, attention seconds, requests that finish, requests in it."""
        compute = self.compute_s * tokens
        head = max(self.head_compute_s * finishing, self.head_weights_s) if finishing else 0.0
        return (
            sqrt(compute * compute + self.weights_s * self.weights_s)
            + (self.elementwise_s + self.comm_token_s) * tokens
            + attention
            + head
            + self.comm_s
            + self.launch_s
            + self.request_s * requests
        )

    def tokens_in(self, seconds: float) -> float:
        """New tokens whose prefill batch lasts `seconds`, attention and head aside: the inverse of `batch`."""
        linear = self.elementwise_s + self.comm_token_s
        budget = seconds - self.launch_s - self.comm_s - self.request_s
        if budget <= self.weights_s:
            return 0.0
        # (compute·n)² + weights² = (budget − linear·n)²
        square = self.compute_s**2 - linear**2
        constant = self.weights_s**2 - budget**2
        if square <= 0:
            return -constant / (2 * budget * linear)
        half = budget * linear
        return (sqrt(half * half - square * constant) - half) / square

    def prefill(self, chunks: Iterable[tuple[int, int, bool]]) -> float:
        """Time of one batch of (new tokens, cached tokens, finishes its prompt)."""
        tokens = finishing = requests = 0
        attention = 0.0
        for new, cached, finishes in chunks:
            tokens += new
            attention += self.attention(new, cached)
            finishing += finishes
            requests += 1
        return self.batch(tokens, attention, finishing, requests)

    def alone(self, new: int, cached: int = 0) -> float:
        """Time of a prompt in one batch of its own."""
        return self.batch(new, self.attention(new, cached), 1, 1)

    def chunked(self, new: int, cached: int, chunk: int) -> float:
        """Time of a prompt alone, computed in chunks of at most `chunk` tokens.

        Attention is that of one pass (chunking changes it only where reading KV dominates, which is small).
        """
        full, rest = divmod(new, chunk)
        total = self.attention(new, cached) + full * self.batch(chunk, 0.0, 0, 1)
        if rest:
            total += self.batch(rest, 0.0, 1, 1)
        return total if rest or not full else total + self.head_weights_s

    def decode(self, requests: int, context_tokens: int) -> float:
        """Time of one decode step of `requests` sequences that hold `context_tokens` in all."""
        compute = self.compute_s * requests
        return (
            sqrt(compute * compute + self.weights_s * self.weights_s)
            + (self.elementwise_s + self.comm_token_s) * requests
            + self.kv_read_s * context_tokens
            + max(self.head_compute_s * requests, self.head_weights_s)
            + self.comm_s
            + self.launch_s
            + self.decode_request_s * requests
        )

    def mixed(self, chunks: Iterable[tuple[int, int, bool]], decoding: int, context_tokens: int) -> float:
        """Time of one step that decodes `decoding` sequences and prefills `chunks` (local prefill, mixed clusters)."""
        tokens, attention, finishing, requests = decoding, self.kv_read_s * context_tokens, decoding, 0
        for new, cached, finishes in chunks:
            tokens += new
            attention += self.attention(new, cached)
            finishing += finishes
            requests += 1
        return self.batch(tokens, attention, finishing, requests) + self.decode_request_s * decoding

    def to_mapping(self) -> dict[str, float]:
        """For `WorkerStats.cost` and profile files."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, float]) -> CostModel:
        """The inverse; unknown names are ignored and missing ones keep their default, so versions interoperate."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: float(value) for name, value in values.items() if name in known})


def usual_cost(workers: Sequence[tuple[CostModel, int]]) -> CostModel | None:
    """The model that stands for several workers: each with its own and the batches that was fitted to (0: not yet).

    The one in the middle, by the time of a usual batch. A worker that has just started says nothing of what workers
    here can do: None where no other is there.
    """
    fitted = sorted(
        (model for model, batches in workers if batches), key=lambda m: m.batch(USUAL_BATCH_TOKENS, 0, 1, 1)
    )
    return fitted[len(fitted) // 2] if fitted else None
