"""The keyed MAC over each chunk where data travels in the clear (`Authenticated`). Pure.

The key is drawn per transfer by the sender and travels in BEGIN, over the encrypted control connection. Covered are
all fields of the CHUNK and its bytes: nobody without the key can write, replace or move a chunk, nor take it to another
transfer.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import msgspec

from lanewise.transfer import messages as m

KEY_BYTES = 32
_TAG_BYTES = 16


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def signed(chunk: m.Chunk, payload: bytes | memoryview, key: bytes) -> m.Chunk:
    return msgspec.structs.replace(chunk, mac=_tag(chunk, payload, key))


def genuine(chunk: m.Chunk, payload: bytes | memoryview, key: bytes) -> bool:
    bare = msgspec.structs.replace(chunk, mac=b"")
    return len(key) == KEY_BYTES and hmac.compare_digest(_tag(bare, payload, key), chunk.mac)


def _tag(bare: m.Chunk, payload: bytes | memoryview, key: bytes) -> bytes:
    state = hmac.new(key, m.encode(bare), hashlib.sha256)
    state.update(payload)  # without the GIL; 1.7 GB/s with SHA instructions, twice what BLAKE2b does
    return state.digest()[:_TAG_BYTES]
