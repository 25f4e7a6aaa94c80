"""What every pod of ours has in common: the Restricted profile, and the only places it may write to.

Owns: security contexts and scratch volumes. Must not: know roles.
"""

from __future__ import annotations

from typing import Any

USER = 65532

POD_SECURITY: dict[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",  # a claim full of weights is not walked at every start
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def scratch() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts) of /tmp, the one writable place under a read-only root."""
    return [{"name": "tmp", "emptyDir": {}}], [{"name": "tmp", "mountPath": "/tmp"}]
