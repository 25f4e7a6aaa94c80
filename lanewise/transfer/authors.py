"""Who has written a message that came by a ZeroMQ connection. Pure.

A message must be of the incarnation that its connection is named after, and of the kind that the connection is for.
"""

from __future__ import annotations

from lanewise.transfer import messages as m

_MAX_NAMES = 4096
_DATA = (m.Chunk, m.Probe)


class Authors:
    def __init__(self, macs: bool) -> None:
        """`macs`: data comes beside the encrypted connections, and its MAC tells the author."""
        self._macs = macs
        self._names: dict[bytes, tuple[str, str]] = {}  # of connections, as they have said

    def check(self, message: m.AnyMessage, routing_id: bytes, *, beside: bool) -> None:
        """MalformedMessage where it names another author than the connection it came by, or that is of another kind.

        `beside`: by the socket for data that is not encrypted. Its connections have no names."""
        data = isinstance(message, _DATA)
        if beside or self._macs:
            if data is not beside:
                raise m.MalformedMessage("a connection of another kind")
            if beside:
                return
        author, channel = self._names.get(routing_id) or self._name(routing_id)
        if channel != ("d" if data else "c") and not self._macs:
            raise m.MalformedMessage("a connection of another kind")
        if author != message.src:
            raise m.MalformedMessage("author and connection differ")

    def _name(self, routing_id: bytes) -> tuple[str, str]:
        """(incarnation, "c" or "d") that a connection's name says; what is no name fits no message."""
        author, _, channel = routing_id.decode(errors="replace").rpartition("/")
        if len(self._names) >= _MAX_NAMES:
            self._names.clear()
        self._names[routing_id] = found = author, channel[:1]
        return found
