"""Content hashes that bind KV to the tokens it was computed from, and the canonical layout of KV on the wire.

Owns: the layout record, the chained hash over fixed units of 64 token ids (a protocol constant, independent of page
size) and the hash over a whole prompt. Must not: hold state, know pages, or do I/O. Used by the engine's prefix cache,
the KV channel, the router's prefix index and the simulator alike, so a hash means the same everywhere.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

UNIT_TOKENS = 64
"""Tokens per hashed unit. A protocol constant: changing it is a new protocol major version."""

DIGEST_BYTES = 16

WIRE_BITS = {"Int8": 8, "KIVI4": 4, "KIVI2": 2}
"""Bits a value takes in each lossy encoding; what they mean `transfer/encoding.py` knows."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one worker's KV. The wire form is `[layer][K|V][token][head][dim]`, whatever the pool looks like."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # storage type, e.g. "float32"
    dtype_bytes: int
    encoding: str = "Native"  # of the wire form; pools are always native

    @property
    def wire_unit(self) -> int:
        """On the wire tokens come in whole units of this many, but for the end of a prompt."""
        return 1 if self.encoding == "Native" else UNIT_TOKENS

    def wire_bytes(self, tokens: int, layers: int) -> int:
        """Bytes of a chunk of that many tokens from the start of a unit on. A lossy layer holds, for keys and for
        values: scales in fp16, minima too below 8 bits, and the values."""
        bits = WIRE_BITS.get(self.encoding)
        if bits is None:
            return self.slice_bytes(tokens, layers)
        channels = self.num_kv_heads * self.head_dim
        scales = -(-tokens // UNIT_TOKENS) * channels + tokens * self.num_kv_heads
        return layers * (2 * tokens * channels * bits // 8 + scales * (2 if bits == 8 else 4))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers, K and V."""
        return self.slice_bytes(1, self.num_layers)

    def slice_bytes(self, tokens: int, layers: int) -> int:
        return 2 * layers * tokens * self.num_kv_heads * self.head_dim * self.dtype_bytes


def _pack(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()  # native order is little-endian on every platform that is served


def chain_hashes(ids: Sequence[int], key: bytes) -> list[bytes]:
    """BLAKE2b-128 chain: one digest per full unit of `ids`; digest i covers ids[0 : 64 * (i + 1)].

    `key` (at most 64 bytes) is `cache_key(fingerprint, salt)`: equal digests mean equal tokens, model and tenant.
    """
    out: list[bytes] = []
    parent = b""
    for end in range(UNIT_TOKENS, len(ids) + 1, UNIT_TOKENS):
        parent = hashlib.blake2b(
            parent + _pack(ids[end - UNIT_TOKENS : end]), digest_size=DIGEST_BYTES, key=key
        ).digest()
        out.append(parent)
    return out


def prompt_hash(ids: Sequence[int], key: bytes) -> bytes:
    """One digest over all ids, so that the tail after the last full unit is bound too."""
    return hashlib.blake2b(_pack(ids), digest_size=DIGEST_BYTES, key=key, person=b"lanewise-prompt").digest()


def cache_key(fingerprint: str, tenant_salt: bytes) -> bytes:
    """32-byte key for the functions above."""
    return hashlib.blake2b(fingerprint.encode() + b"\0" + tenant_salt, digest_size=32).digest()
