"""The little of the Kubernetes API that a router needs: list and watch, as its ServiceAccount.

Owns: where the API server is, the account's token and CA (both are replaced while the pod runs), and the wire format
of a watch. Must not: know what is listed, or try again (its user does).
"""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from lanewise.errors import ConfigError

LIST_S = 15.0
CONNECT_S = 5.0
WATCH_S = 240  # the server ends a watch after about this long; a new one goes on where it ended
OPENED = "OPENED"
MAX_LINE_BYTES = 16 * 1024 * 1024  # one object; etcd takes 1.5 MiB
# A server that vanished without a word is noticed within about 30 s.
KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class Expired(Exception):
    """The resourceVersion is too old: list again."""


class ApiFailed(Exception):
    """The API server is away, refuses, or says what makes no sense."""


class KubernetesApi:
    """One connection pool; an async context manager."""

    def __init__(self, url: str, account_dir: str) -> None:
        self._url = (url or _in_cluster()).rstrip("/")
        self._account = Path(account_dir)
        self._client: aiohttp.ClientSession | None = None
        self._ca: tuple[bytes, ssl.SSLContext] | None = None

    async def __aenter__(self) -> KubernetesApi:
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=_socket, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            read_bufsize=MAX_LINE_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()

    async def list(self, path: str, selector: str) -> tuple[list[dict[str, Any]], str]:
        """All objects, and the resourceVersion to watch from. Raises ApiFailed."""
        timeout = aiohttp.ClientTimeout(total=LIST_S, sock_connect=CONNECT_S)
        try:
            async with self._get(path, {"labelSelector": selector}, timeout) as response:
                body = _object(await response.read(), "a list")
                if response.status != 200:
                    raise _refused(response.status, body)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiFailed(_words(error)) from error
        items, version = body.get("items") or [], (body.get("metadata") or {}).get("resourceVersion")
        if not version or not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ApiFailed("the answer to a list is no list")
        return items, str(version)

    async def watch(self, path: str, selector: str, version: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(OPENED, {}), then (type, object) from that resourceVersion on, until the server ends it.

        Raises Expired and ApiFailed.
        """
        seconds = round(WATCH_S * random.uniform(0.8, 1.2))
        query = {
            "labelSelector": selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=seconds + 30)
        try:
            async with self._get(path, query, timeout) as response:
                if response.status != 200:
                    raise _refused(response.status, _object(await response.read(), "a refusal"))
                yield OPENED, {}
                while line := await response.content.readline():
                    if not line.endswith(b"\n"):
                        raise ApiFailed("the watch was cut in the middle of an event")
                    yield _event(line)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ApiFailed(_words(error)) from error

    def _get(self, path: str, query: Mapping[str, str], timeout: aiohttp.ClientTimeout) -> Any:
        assert self._client is not None  # used inside `async with`
        headers = {"Accept": "application/json", "User-Agent": "lanewise-router"}
        token = self._read("token").strip()
        if token:
            headers["Authorization"] = f"Bearer {token.decode()}"
        return self._client.get(self._url + path, params=query, headers=headers, timeout=timeout, ssl=self._trust())

    def _trust(self) -> ssl.SSLContext | bool:
        """A context for the CA that is mounted now."""
        if not self._url.startswith("https:"):
            return True
        pem = self._read("ca.crt")
        if self._ca is None or self._ca[0] != pem:
            try:
                self._ca = (pem, ssl.create_default_context(cadata=pem.decode() if pem else None))
            except (ssl.SSLError, ValueError) as error:
                raise ApiFailed(f"{self._account / 'ca.crt'}: {error}") from error
        return self._ca[1]

    def _read(self, name: str) -> bytes:
        """Read at every call: the kubelet replaces both files long before what they hold expires."""
        try:
            return (self._account / name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise ApiFailed(f"{self._account / name}: {error.strerror}") from error


def _in_cluster() -> str:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError("discovery: kubernetes needs a pod (KUBERNETES_SERVICE_HOST is not set) or kubernetes_api")
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _socket(info: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(*info[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE:
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


def _object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ApiFailed(f"expected {what} as a JSON object, got {raw[:80]!r}")
    return body


def _event(line: bytes) -> tuple[str, dict[str, Any]]:
    event = _object(line, "a watch event")
    kind, thing = event.get("type"), event.get("object")
    if not isinstance(kind, str) or not isinstance(thing, dict):
        raise ApiFailed(f"expected type and object in a watch event, got {line[:80]!r}")
    if kind == "ERROR":
        raise _refused(int(thing.get("code") or 0), thing)
    return kind, thing


def _refused(status: int, body: Mapping[str, Any]) -> Exception:
    message = f"{status} {body.get('reason') or ''}: {body.get('message') or ''}"
    return Expired(message) if status == 410 else ApiFailed(message)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
