"""API keys: who may ask, and which cache they share.

Owns: the key file and its rereading when it changes (a mounted Secret is replaced in place).
Must not: know a transport; both servers hand in what the client presented.
"""

from __future__ import annotations

import hashlib
import os
import time

import structlog

from lanewise.errors import ConfigError, ErrorCode, LanewiseError

CHECK_S = 1.0

log = structlog.get_logger(__name__)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16, person=b"lanewise-tenant").digest()


class ApiKeys:
    """Holds digests only, so that comparing takes the same time for every wrong key."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._digests: frozenset[bytes] = frozenset()
        self._mtime = 0.0
        self._checked_at = 0.0
        if path:
            try:
                self._load()
            except OSError as error:
                raise ConfigError(f"cannot read the API keys: {error}") from error

    def check(self, authorization: str | None) -> bytes:
        """The tenant salt of the caller; empty where no keys are configured. Raises UNAUTHENTICATED."""
        if not self._path:
            return b""
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        if scheme.lower() != "bearer" or digest not in self._digests:
            raise LanewiseError(ErrorCode.UNAUTHENTICATED, "no valid API key; send `Authorization: Bearer <key>`")
        return digest

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < CHECK_S:
            return
        self._checked_at = now
        try:
            if os.stat(self._path).st_mtime != self._mtime:
                self._load()
        except OSError as error:  # keep the keys that were valid last
            log.warning("api_keys_unreadable", reason=str(error))

    def _load(self) -> None:
        mtime = os.stat(self._path).st_mtime
        with open(self._path, encoding="utf-8") as file:
            keys = [line.strip() for line in file]
        self._digests = frozenset(_digest(key) for key in keys if key and not key.startswith("#"))
        self._mtime = mtime
