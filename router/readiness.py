"""Whether a worker gets new work from this router, and if not, why.

Owns: that one rule. Must not: keep state.
"""

from __future__ import annotations

from lanewise.fleet import LinkState, Role, WorkerIdentity, WorkerStats
from lanewise.router.discovery import Endpoint


def why_not(identity: WorkerIdentity, stats: WorkerStats, endpoint: Endpoint) -> str:
    """Empty when it does: its own word comes first, then the cluster's, then the KV path.

    A prefill worker needs one partner that it has sent a test block to. A decode worker without a partner prefills by
    itself, so it needs none.
    """
    if stats.draining:
        return "draining"
    if endpoint.terminating:
        return "its pod is terminating"
    if not endpoint.ready:
        return "its pod is not ready"
    if identity.role is Role.PREFILL and not any(link.state is LinkState.VERIFIED for link in stats.links):
        failed = next((link.reason for link in stats.links if link.state is LinkState.FAILED), "")
        return f"no verified partner: {failed}" if failed else "no verified partner"
    return ""
