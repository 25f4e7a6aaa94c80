"""What the routers' view of the fleet says about a service: KV paths, lanes, whether disaggregation pays. Pure.

Owns: these conditions. Must not: ask routers (fleet.py does).
"""

from __future__ import annotations

from lanewise.operator.fleet import FleetView
from lanewise.spec import LLMService
from lanewise.spec_status import LaneStatus

MIN_REMOTE = 20.0  # requests, before a comparison means something
MIN_LOCAL = 5.0
MAX_LANES = 8

Finding = tuple[str, str, str]


def kv_path(service: LLMService, fleet: FleetView) -> Finding:
    """False only for a pair whose test failed, naming it; Unknown when no router answers."""
    if fleet.answered == 0:
        asked = f"none of {fleet.asked} routers answered" if fleet.asked else "there is no router to ask"
        return "Unknown", "FleetUnreachable", asked
    prefill = {worker.incarnation: worker for worker in fleet.workers if worker.role == "prefill"}
    decode = {worker.incarnation: worker for worker in fleet.workers if worker.role == "decode"}
    verified, failed, untested = 0, [], 0
    for source in prefill.values():
        states = {link.peer: link for link in source.links}
        for target in decode.values():
            if source.fingerprint != target.fingerprint or source.draining or target.draining:
                continue  # of a rollout or a departure: no pair
            link = states.get(target.incarnation)
            if link is None or link.state == "untested":
                untested += 1
            elif link.state == "failed":
                failed.append(f"{source.name} -> {target.name}: {link.reason or 'no reason given'}")
            else:
                verified += 1
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return "False", "LinkFailed", sorted(failed)[0] + more
    if not prefill or service.spec.prefill.replicas == 0 or service.spec.disaggregation == "Never":
        return "True", "NotNeeded", "no prefill workers: nothing is transferred"
    if verified and not untested:
        return "True", "Verified", f"{_pairs(verified)} passed a test transfer"
    if verified:
        return "True", "PartlyVerified", f"{_pairs(verified)} passed a test transfer, {untested} not tested yet"
    return "Unknown", "NotTested", "no pair has been tested yet"


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count} pairs"


def beneficial(service: LLMService, fleet: FleetView) -> Finding:
    """Measured remote prefill against what the same requests would have taken locally, by a model that is
    corrected by how far it is off for local ones."""
    if service.spec.disaggregation == "Never" or service.spec.prefill.replicas == 0:
        return "False", "Disabled", "every request is prefilled where it is decoded"
    if fleet.answered == 0:
        return "Unknown", "FleetUnreachable", "no router answered"
    remote, local = fleet.remote, fleet.local
    if remote.weight < MIN_REMOTE:
        return "Unknown", "NotEnoughRequests", f"fewer than {MIN_REMOTE:g} requests were prefilled remotely"
    measured = local.weight >= MIN_LOCAL and local.predicted_ttft_s > 0
    correction = local.ttft_s / local.predicted_ttft_s if measured else 1.0
    other = remote.other_ttft_s * correction
    text = f"TTFT {_ms(remote.ttft_s)} with remote prefill, {_ms(other)} predicted with local prefill"
    text += " (corrected by measured local ones)" if measured else ""
    if remote.ttft_s < other:
        return "True", "RemoteFaster", text
    return "False", "LocalFaster", text


def _ms(seconds: float) -> str:
    return f"{float(f'{seconds * 1000:.2g}'):g}ms"


def lanes(fleet: FleetView) -> list[LaneStatus]:
    """Lanes with their tails, rounded to two digits."""
    return [
        LaneStatus(
            name=lane.name,
            max_tokens=lane.max_tokens or None,
            workers=lane.workers,
            ttft_p99=_ms(lane.ttft_p99_s) if lane.ttft_p99_s > 0 else None,
        )
        for lane in fleet.lanes[:MAX_LANES]
    ]
