"""The DEALER sockets of a prefill worker to one decode address: one for control, one per data stripe.

Must not: know messages or transfers. Their fixed routing ids ("<incarnation>/c", "<incarnation>/d0") tell the ROUTER
on the other side who speaks and which kind of socket it is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import zmq

from lanewise.transfer.faults import Frames
from lanewise.transfer.messages import MAX_HEADER_BYTES
from lanewise.transfer.records import Limits
from lanewise.transfer.zmq_link import common_options


@dataclass(slots=True)
class Connection:
    address: str
    control: zmq.Socket[bytes]
    data: list[zmq.Socket[bytes]]
    outbox: deque[Frames] = field(default_factory=deque)
    probes: dict[int, Frames] = field(default_factory=dict)  # per stripe, until its socket takes it


def open_connection(
    context: zmq.Context[zmq.Socket[bytes]], address: str, incarnation: str, limits: Limits
) -> Connection:
    """Raises ZMQError where the address cannot be an address."""
    control = make_dealer(context, address, f"{incarnation}/c", limits, data=False)
    names = (f"{incarnation}/d{index}" for index in range(limits.stripes))
    return Connection(address, control, [make_dealer(context, address, name, limits, data=True) for name in names])


def make_dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, name: str, limits: Limits, *, data: bool
) -> zmq.Socket[bytes]:
    sock = context.socket(zmq.DEALER)
    common_options(sock, address)
    sock.setsockopt(zmq.ROUTING_ID, name.encode())
    sock.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing for a connection that does not exist
    sock.setsockopt(zmq.SNDHWM, limits.data_hwm if data else limits.control_hwm)
    sock.setsockopt(zmq.RCVHWM, limits.control_hwm)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_HEADER_BYTES)
    sock.setsockopt(zmq.CONNECT_TIMEOUT, 2000)
    sock.setsockopt(zmq.RECONNECT_IVL, 50)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    try:
        sock.connect(address)
    except zmq.ZMQError:
        sock.close()
        raise
    return sock


def writable(sock: zmq.Socket[bytes]) -> bool:
    return bool(int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)
