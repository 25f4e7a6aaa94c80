"""What kopf does for us: watching. Every event is remembered in the store and puts one key into the queue.

Owns: which kinds are watched and how kopf is set up (no finalizers, no annotations, no Events of its own, no peering).
Must not: reconcile. kopf runs in a thread of its own, since it cancels every task it finds in its loop when it stops.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import kopf
import structlog

from lanewise.config import OperatorConfig
from lanewise.operator.kinds import CHILDREN, KINDS, Kind
from lanewise.operator.names import SERVICE_LABEL

STOP_S = 5.0

log = structlog.get_logger(__name__)

Sink = Callable[[str, dict[str, Any], bool, bool], None]
"""Called in the operator's own loop with (kind, body, deleted, initial)."""


def settings_for(selectors: dict[Kind, str]) -> kopf.OperatorSettings:
    """kopf as a watcher and nothing else. `selectors`: by kind, the labels an object needs to be of interest."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.process.ultimate_exiting_timeout = None  # it would kill the thread, and with it the process
    settings.networking.request_timeout = 30.0
    settings.watching.server_timeout = 600  # written into the URL as it is: no float
    settings.watching.chunk_size = 500
    for kind, selector in selectors.items():
        settings.watching.label_selectors[kind.group, kind.version, kind.plural] = selector
    return settings


class Watcher:
    """kopf in a thread. `start()`, then `failed` is set if it ever ends by itself; `stop()` ends it."""

    def __init__(self, config: OperatorConfig, sink: Sink, extra: dict[str, Kind] | None = None) -> None:
        self._config, self._sink = config, sink
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.failed = asyncio.Event()
        children = {name: kind for name, kind in CHILDREN.items() if kind.watched}
        self._kinds = {"LLMService": KINDS["LLMService"], **children, **(extra or {})}
        self._selectors = dict.fromkeys(children.values(), SERVICE_LABEL)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Hears nothing more; the thread ends in its own time, or with the process."""
        self._stop.set()

    async def stop(self) -> None:
        """Returns when the watches are closed, or after STOP_S."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_S)

    def _run(self) -> None:
        logging.getLogger("kopf").setLevel(logging.ERROR)
        try:
            kopf.run(
                registry=self._registry(),
                settings=settings_for(self._selectors),
                clusterwide=not self._config.namespaces,
                namespaces=list(self._config.namespaces),
                stop_flag=self._stop,
            )
        except Exception as error:  # the thread's edge: whatever it was, the operator is blind now
            log.error("watching_failed", error=f"{type(error).__name__}: {error}")
        if not self._stop.is_set():
            self._loop.call_soon_threadsafe(self.failed.set)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._login)
        for name, kind in self._kinds.items():
            kopf.on.event(kind.group, kind.version, kind.plural, registry=registry, id=name)(self._handler(name, kind))
        return registry

    def _login(self, **kwargs: Any) -> Any:
        """As cluster.py: the kubeconfig of the configuration, else the pod's service account."""
        if self._config.kubeconfig:
            return login_with_file(self._config.kubeconfig)
        found = kopf.login_with_service_account(**kwargs)
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        # By address, not by kopf's name for it: an operator works while the cluster's DNS does not.
        if not found or not host:
            return found
        return dataclasses.replace(
            found, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        )

    def _handler(self, name: str, kind: Kind) -> Callable[..., Any]:
        def on_event(event: dict[str, Any], **_: Any) -> None:
            body = {"apiVersion": kind.api, "kind": name, **event["object"]}
            if self._stop.is_set():
                return  # nobody listens any more
            deleted, initial = event["type"] == "DELETED", event["type"] is None
            self._loop.call_soon_threadsafe(self._sink, name, body, deleted, initial)

        async def handle(event: dict[str, Any], **kwargs: Any) -> None:
            on_event(event, **kwargs)  # a coroutine, so that kopf starts no thread for it

        return handle


def login_with_file(path: str) -> kopf.ConnectionInfo:
    """kopf's own reader takes the path from the environment only."""
    import yaml

    with open(path, encoding="utf-8") as file:
        data = yaml.safe_load(file)
    chosen = next(item["context"] for item in data["contexts"] if item["name"] == data["current-context"])
    cluster = next(item["cluster"] for item in data["clusters"] if item["name"] == chosen["cluster"])
    user = next(item["user"] for item in data["users"] if item["name"] == chosen["user"])
    return kopf.ConnectionInfo(
        server=cluster["server"],
        ca_path=cluster.get("certificate-authority"),
        ca_data=cluster.get("certificate-authority-data"),
        insecure=cluster.get("insecure-skip-tls-verify"),
        certificate_path=user.get("client-certificate"),
        certificate_data=user.get("client-certificate-data"),
        private_key_path=user.get("client-key"),
        private_key_data=user.get("client-key-data"),
        token=user.get("token"),
    )
