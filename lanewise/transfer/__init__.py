"""The KV channel: moves the KV cache of one prompt from a prefill worker into a decode worker, whole or not at all.

Owns: messages, state machines, sockets and fault hooks of that channel; see docs/kv-channel.md.
Must not: import torch, asyncio or the engine. Pages belong to the loops; the channel borrows them between `begin` or
`grant` and the event that ends the transfer.
"""

from lanewise.transfer.faults import Faults
from lanewise.transfer.receiver import Receiver
from lanewise.transfer.records import (
    Aborted,
    Busy,
    Committed,
    Counters,
    Delivered,
    Drained,
    Endpoint,
    Granted,
    Key,
    Limits,
    LinkReport,
    Offered,
    PageStore,
    Peer,
    ReceiverEvent,
    SenderEvent,
    Sent,
    Timers,
)
from lanewise.transfer.sender import Sender

__all__ = [
    "Aborted",
    "Busy",
    "Committed",
    "Counters",
    "Delivered",
    "Drained",
    "Endpoint",
    "Faults",
    "Granted",
    "Key",
    "Limits",
    "LinkReport",
    "Offered",
    "PageStore",
    "Peer",
    "Receiver",
    "ReceiverEvent",
    "Sender",
    "SenderEvent",
    "Sent",
    "Timers",
]
