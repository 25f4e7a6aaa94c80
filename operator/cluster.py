"""The Kubernetes API: the one place that talks to it, with one method through which every write goes.

Owns: paths, credentials, timeouts, errors in our own words, and the fence: no write is started unless this process
still holds the Lease by its own monotonic clock. Must not: decide what to write.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config as kubeconfig
from kubernetes.aio.client import ApiClient, Configuration

from lanewise.config import OperatorConfig
from lanewise.errors import ConfigError
from lanewise.operator.kinds import KINDS
from lanewise.operator.names import MANAGER
from lanewise.telemetry import Metrics

REQUEST_TIMEOUT_S = 3.0
APPLY = "application/apply-patch+yaml"
JSON = "application/json"
POOL = 32
NO_SUCH_FIELD = "failed to create typed patch object"


class ApiError(Exception):
    """An answer of the API server that is not a success, in its own words."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def refused(self) -> bool:
        """The request itself is at fault (quota, admission, schema, permission): repeating it at once is no use."""
        return 400 <= self.status < 500 and self.status not in (404, 408, 409, 410, 429)


class Unavailable(Exception):
    """No answer: the API server is away, slow, or overloaded. Try again later."""


class Fenced(Exception):
    """This process may not write (any more): its Lease has run out by its own clock."""


@dataclass
class Fence:
    """Until when this process may write, by its monotonic clock. The elector moves it."""

    deadline: float = 0.0
    clock: Callable[[], float] = time.monotonic

    def check(self) -> None:
        if self.clock() >= self.deadline:
            raise Fenced("the lease has run out by this process's own clock")


_fence: contextvars.ContextVar[Fence | None] = contextvars.ContextVar("fence", default=None)


async def _check_fence(*_: Any) -> None:
    """Called by aiohttp when a connection is at hand, right before the request is written to it."""
    fence = _fence.get()
    if fence is not None:
        fence.check()


class Cluster:
    """Reads and writes of one process. `open()` first; `close()` at the end."""

    def __init__(self, config: OperatorConfig, metrics: Metrics) -> None:
        self._config = config
        self._client: ApiClient | None = None
        self.fence = Fence()
        self._sending: set[asyncio.Future[dict[str, Any]]] = set()
        self.last_answer = 0.0  # monotonic time of the last answer of any kind
        self._requests = metrics.counter(
            "api_requests_total", "Requests to the Kubernetes API.", ("verb", "kind", "code")
        )

    async def open(self) -> None:
        """Credentials from `kubeconfig` of the configuration, else of the pod. ConfigError where there are none."""
        found = Configuration()
        try:
            if self._config.kubeconfig:
                await kubeconfig.load_kube_config(self._config.kubeconfig, client_configuration=found)  # type: ignore[no-untyped-call]
            else:
                kubeconfig.load_incluster_config(client_configuration=found)  # type: ignore[no-untyped-call]
        except kubeconfig.ConfigException as error:
            raise ConfigError(f"no way to the Kubernetes API ({error}); expected a pod or kubeconfig") from error
        found.connection_pool_maxsize = POOL
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_check_fence)
        trace.on_connection_create_end.append(_check_fence)
        found.trace_configs = [trace]
        self._client = ApiClient(found)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------ reads

    async def list(self, kind: str, namespace: str | None = None, **query: str) -> list[dict[str, Any]]:
        """Objects of a kind; `query` are parameters such as labelSelector. Every item carries apiVersion and kind."""
        found = await self._send("GET", path_of(kind, namespace), kind, query=query)
        common = {"apiVersion": KINDS[kind].api, "kind": kind}
        return [{**common, **item} for item in found.get("items", [])]

    async def has_kind(self, kind: str) -> bool:
        """Whether the cluster serves this API at all."""
        try:
            found = await self._send("GET", f"/apis/{KINDS[kind].api}", "APIResourceList")
        except ApiError as error:
            if error.status in (403, 404):
                return False
            raise
        return any(item.get("kind") == kind for item in found.get("resources", []))

    async def get(self, kind: str, namespace: str | None, name: str) -> dict[str, Any] | None:
        """One object, or None."""
        try:
            return await self._send("GET", path_of(kind, namespace, name), kind)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    # ------------------------------------------------------------ writes

    async def apply(
        self,
        manifest: Mapping[str, Any],
        *,
        subresource: str = "",
        manager: str = MANAGER,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Server-side apply. What others set in our fields is taken back; their own fields stay."""
        kind, metadata = manifest["kind"], manifest["metadata"]
        owner = "Deployment" if kind == "Scale" else kind
        path = path_of(owner, metadata.get("namespace"), metadata["name"], subresource)
        query = {"fieldManager": manager, "force": "true", "fieldValidation": "Strict"}
        if dry_run:
            query["dryRun"] = "All"
        return await self._write("PATCH", path, kind, manifest, query=query, content_type=APPLY)

    async def create(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        path = path_of(manifest["kind"], manifest["metadata"].get("namespace"))
        return await self._write("POST", path, manifest["kind"], manifest, query={"fieldManager": MANAGER})

    async def replace(self, manifest: dict[str, Any], *, fenced: bool = True) -> dict[str, Any]:
        """Replace as a whole, on condition of `metadata.resourceVersion`. Only the elector passes fenced=False."""
        metadata = manifest["metadata"]
        path = path_of(manifest["kind"], metadata.get("namespace"), metadata["name"])
        return await self._write("PUT", path, manifest["kind"], manifest, query={}, fenced=fenced)

    async def create_unfenced(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The elector's first Lease: there is nothing yet that could fence it."""
        path = path_of(manifest["kind"], manifest["metadata"].get("namespace"))
        return await self._write("POST", path, manifest["kind"], manifest, query={}, fenced=False)

    async def delete(self, kind: str, namespace: str | None, name: str, uid: str) -> None:
        """Delete this very object (not a successor of the same name). One that is gone already is no error."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        with contextlib.suppress(Gone):
            await self._write("DELETE", path_of(kind, namespace, name), kind, body, query={})

    async def _write(
        self,
        method: str,
        path: str,
        kind: str,
        body: Mapping[str, Any],
        *,
        query: Mapping[str, str],
        content_type: str = JSON,
        fenced: bool = True,
    ) -> dict[str, Any]:
        token = _fence.set(self.fence if fenced else None)
        try:
            await _check_fence()
            sending = asyncio.ensure_future(
                self._send(method, path, kind, body=body, query=query, content_type=content_type)
            )
            self._sending.add(sending)
            sending.add_done_callback(self._sent)
            # Once it has begun it is finished, even where its caller is cancelled: see quiet().
            return await asyncio.shield(sending)
        finally:
            _fence.reset(token)

    def _sent(self, sending: asyncio.Future[dict[str, Any]]) -> None:
        self._sending.discard(sending)
        if not sending.cancelled():
            sending.exception()  # whoever waited has it; where nobody waits any more it is of no use

    async def quiet(self) -> None:
        """Returns when no write is under way; a Lease that is released before that would be released too early."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=REQUEST_TIMEOUT_S)

    async def _send(
        self,
        method: str,
        path: str,
        kind: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = JSON,
    ) -> dict[str, Any]:
        assert self._client is not None, "open() comes first"
        headers = {"Accept": JSON, "Content-Type": content_type}
        request = await self._client.param_serialize(
            method, path, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        url = request[1] + (f"?{urlencode(query)}" if query else "")
        code = "none"
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                answer = await self._client.call_api(request[0], url, *request[2:], _request_timeout=REQUEST_TIMEOUT_S)
                text = await answer.read()  # type: ignore[no-untyped-call]
                code = str(answer.status)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__} {error}".strip()) from error
        finally:
            self._requests.labels(method, kind, code).inc()
        self.last_answer = time.monotonic()
        return _checked(answer.status, text)


class Gone(ApiError):
    """The object does not exist, or is another one than was meant."""


def _checked(status: int, text: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text or b"{}")
    except ValueError:
        found = {"message": text[:200].decode(errors="replace")}
    if 200 <= status < 300:
        return found
    reason, message = str(found.get("reason") or "Unknown"), str(found.get("message") or "no message")
    if status == 500 and NO_SUCH_FIELD in message:
        raise ApiError(422, "Invalid", message)  # of server-side apply: what was sent fits no schema
    if status >= 500 or status == 429:
        raise Unavailable(f"{status} {reason}: {message}")
    if status == 404 or (status == 409 and "UID in precondition" in message):
        raise Gone(status, reason, message)
    raise ApiError(status, reason, message)


def path_of(kind: str, namespace: str | None, name: str = "", subresource: str = "") -> str:
    """The URL path of a collection, an object, or a part of one."""
    known = KINDS[kind]
    root = "/api" if "/" not in known.api else "/apis"
    parts = [root, known.api]
    parts += ["namespaces", namespace] if namespace else []
    parts += [part for part in (known.plural, name, subresource) if part]
    return "/".join(parts)


def scale_of(namespace: str, name: str, replicas: int) -> dict[str, Any]:
    """The scale of a Deployment as `apply(..., subresource="scale")` wants it."""
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": metadata, "spec": {"replicas": replicas}}
