"""Writing a status, and the few Events that go with it.

Owns: when this operator last wrote a status. Must not: decide what it says (status.py) or is worth (status_write.py).
"""

from __future__ import annotations

import math
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import structlog
from pydantic import ValidationError

from lanewise.config import OperatorConfig
from lanewise.operator.cluster import ApiError, Cluster
from lanewise.operator.observed import Key, Store
from lanewise.operator.status_write import event_of, eventful, worth_writing
from lanewise.spec import API_VERSION
from lanewise.spec_status import LLMServiceStatus, RuntimeStatus

log = structlog.get_logger(__name__)


class Publisher:
    """Statuses of LLMServices."""

    def __init__(self, cluster: Cluster, store: Store, config: OperatorConfig) -> None:
        self._cluster, self._store, self._config = cluster, store, config
        self._written: dict[Key, float] = {}

    async def publish(self, key: Key, status: LLMServiceStatus) -> bool:
        """Writes where it is worth it. False: numbers have changed and wait for their turn."""
        body = self._store.get(key).service
        if body is None:
            return True
        previous = previous_status(body)
        if status == previous:
            return True
        now = time.monotonic()
        age_s = now - self._written.get(key, -math.inf)
        if not worth_writing(previous, status, age_s, self._config.status_period_s):
            return age_s >= self._config.status_period_s
        written = await self._cluster.apply(_manifest(key, status), subresource="status")
        self._store.service(written, deleted=False)
        self._written[key] = now
        for condition in eventful(previous, status):
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            event = event_of(body, condition, self._config.pod_name, stamp, uuid.uuid4().hex[:16])
            try:
                await self._cluster.create(event)
            except ApiError as error:  # an Event is a courtesy
                log.warning("event_refused", key=key, error=str(error))
        return True


def previous_status(body: dict[str, Any]) -> LLMServiceStatus:
    """What stands in the cluster; a status of another version that cannot be read counts as none, but for its pin."""
    found = body.get("status") or {}
    try:
        return LLMServiceStatus.model_validate(found)
    except ValidationError:
        log.warning("status_unreadable", name=body["metadata"]["name"], namespace=body["metadata"]["namespace"])
    try:
        return LLMServiceStatus(runtime=RuntimeStatus.model_validate(found.get("runtime")))
    except ValidationError:
        return LLMServiceStatus()


def _manifest(key: Key, status: LLMServiceStatus) -> dict[str, Any]:
    metadata = {"namespace": key[0], "name": key[1]}
    data = status.model_dump(by_alias=True, exclude_none=True)
    return {"apiVersion": API_VERSION, "kind": "LLMService", "metadata": metadata, "status": data}
