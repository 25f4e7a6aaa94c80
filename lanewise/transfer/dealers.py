"""The DEALER sockets of a prefill worker to one decode address: one for control, one per data stripe.

Must not: know messages or transfers. Their fixed routing ids ("<incarnation>/c", "<incarnation>/d0") tell the ROUTER
on the other side who speaks and which kind of socket it is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import zmq

from lanewise.transfer.faults import Frames
from lanewise.transfer.keys import Security
from lanewise.transfer.messages import MAX_HEADER_BYTES
from lanewise.transfer.records import Limits
from lanewise.transfer.zmq_link import common_options

Options = dict[int, bytes]
_POLLOUT = int(zmq.POLLOUT)  # a number: an enum costs more to combine than the question to the socket


@dataclass(slots=True)
class Connection:
    address: str
    control: zmq.Socket[bytes]
    data: list[zmq.Socket[bytes]]
    data_at: tuple[int, bytes] = (0, b"")  # port and token, where data has connections of another kind than control
    outbox: deque[Frames] = field(default_factory=deque)
    control_stuck: bool = False  # the poller waits until the control socket takes more
    probes: dict[int, Frames] = field(default_factory=dict)  # per stripe, until its socket takes it


def open_connection(
    context: zmq.Context[zmq.Socket[bytes]], address: str, incarnation: str, limits: Limits, security: Security
) -> Connection:
    """Raises ZMQError where the address cannot be an address, ConfigError where keys are missing.

    With `security.macs` it has no data sockets before `open_data`."""

    def options(name: str) -> Options:
        found: Options = {zmq.ROUTING_ID: name.encode()}
        if security.on:
            keys = security.client()
            found |= {zmq.CURVE_PUBLICKEY: keys.public, zmq.CURVE_SECRETKEY: keys.secret}
            found[zmq.CURVE_SERVERKEY] = security.server_public()
        return found

    control = make_dealer(context, address, options(f"{incarnation}/c"), limits, data=False)
    stripes = 0 if security.macs else limits.stripes
    names = [f"{incarnation}/d{index}" for index in range(stripes)]
    return Connection(address, control, [make_dealer(context, address, options(n), limits, data=True) for n in names])


def open_data(
    context: zmq.Context[zmq.Socket[bytes]], control: str, port: int, token: bytes, incarnation: str, limits: Limits
) -> list[zmq.Socket[bytes]]:
    """Data sockets to another port of the same host, which the token opens. They have no name that a listener on the
    wire could take over: whose a chunk is, its MAC tells."""
    address = f"{control.rpartition(':')[0]}:{port}"
    options: Options = {zmq.PLAIN_USERNAME: incarnation.encode(), zmq.PLAIN_PASSWORD: token}
    return [make_dealer(context, address, options, limits, data=True) for _ in range(limits.stripes)]


def make_dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, options: Options, limits: Limits, *, data: bool
) -> zmq.Socket[bytes]:
    sock = context.socket(zmq.DEALER)
    common_options(sock, address)
    for option, value in options.items():
        sock.setsockopt(option, value)
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
    return bool(int(sock.getsockopt(zmq.EVENTS)) & _POLLOUT)
