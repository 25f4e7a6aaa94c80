"""EndpointSlices of one Service as the API server writes them, folded into addresses.

Owns: what the conditions of an endpoint mean, and one address per pod. Must not: do I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lanewise.router.discovery import Endpoint

PORT_NAME = "grpc"


def fold(slices: Iterable[Mapping[str, Any]]) -> dict[str, Endpoint]:
    """The endpoints of these slices by host:port.

    A pod may stand in several slices for a moment, or with an address of each family: it is one worker, so the first
    address (IPv4 before IPv6) is taken, ready if any says so and terminating if any says so.
    """
    places: dict[str, tuple[str, Endpoint]] = {}  # pod uid (or address) -> its address and endpoint
    for slice_ in sorted(slices, key=lambda s: (str(s.get("addressType", "")), _name(s))):
        port = _port(slice_)
        if port is None or slice_.get("addressType") == "FQDN":
            continue
        for endpoint in slice_.get("endpoints") or ():
            addresses = endpoint.get("addresses") or ()
            if not addresses:
                continue
            host = str(addresses[0])
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            seen = _conditions(endpoint.get("conditions") or {})
            identity = str((endpoint.get("targetRef") or {}).get("uid") or address)
            if identity in places:
                address, known = places[identity]
                seen = Endpoint(known.ready or seen.ready, known.terminating or seen.terminating)
            places[identity] = (address, seen)
    return dict(places.values())


def _name(slice_: Mapping[str, Any]) -> str:
    return str((slice_.get("metadata") or {}).get("name", ""))


def _port(slice_: Mapping[str, Any]) -> int | None:
    """The port named `grpc`, or the only port where it has no name."""
    ports = slice_.get("ports") or ()
    for port in ports:
        if port.get("name") == PORT_NAME or (len(ports) == 1 and not port.get("name")):
            return int(port["port"]) if port.get("port") else None
    return None


def _conditions(conditions: Mapping[str, Any]) -> Endpoint:
    """A missing `ready` means ready, a missing `terminating` means not terminating, as the API says.

    `serving` (ready, were it not terminating) needs no field of its own: a terminating endpoint keeps its streams
    whether it passes its probe or not, and takes no new ones.
    """
    ready = conditions.get("ready")
    return Endpoint(ready=ready is None or bool(ready), terminating=bool(conditions.get("terminating")))
