"""The direct connections of a prefill worker, one per decode worker, and who is offered to read this one's memory.

Must not: write them (`outlet.py` does), or decide which chunk goes.
"""

from __future__ import annotations

from lanewise.transfer import direct, ipc_link, neighbour
from lanewise.transfer import messages as m
from lanewise.transfer.ipc_link import Device
from lanewise.transfer.outlet import Outlet, Owner
from lanewise.transfer.records import Key
from lanewise.transfer.trial import References, Route


class Outlets:
    def __init__(self, incarnation: str, owner: Owner, references: References, device: Device | None = None) -> None:
        self._incarnation = incarnation
        self._owner = owner
        self._references = references
        self._device = device
        self._place = ipc_link.place(device)
        if references is not References.NEVER:
            neighbour.open_to_siblings()
        self._outlets: dict[str, Outlet] = {}  # by address

    def greeted(self, address: str, ack: m.HelloAck, now: float) -> None:
        """Opens a connection to a partner that has answered HELLO, where it takes any and has none of ours."""
        where = (ack.src, ack.direct_port, ack.direct_token)
        outlet = self._outlets.get(address)
        if (outlet and outlet.where == where) or ack.dst != self._incarnation:
            return
        self.forget(address)  # of an incarnation that was there before
        takes = bool(ack.direct_port) and not ack.refusal and len(ack.direct_token) == direct.TOKEN_BYTES
        near = bool(self._place) and ack.place == self._place
        if self._references is References.ALWAYS and not ack.refusal and not (takes and near):
            self._owner.impossible(address, "the decode worker is on another host or takes no direct connections")
        elif takes:
            references = self._references if near else References.NEVER
            block_bytes = min(self._owner.limits.chunk_bytes, ack.max_chunk_bytes)
            if self._device:
                block_bytes = min(block_bytes, self._device.block[1])
            outlet = Outlet(address, where, self._incarnation, self._owner, references, block_bytes, self._device)
            self._outlets[address] = outlet
            outlet.tick(now)

    def proved(self, address: str, ack: m.ProbeAck, now: float) -> None:
        if outlet := self._outlets.get(address):
            outlet.proved(ack, now)

    def to(self, address: str) -> Outlet | None:
        """The connection to this address, where one is up and data goes by it, or by reference."""
        outlet = self._outlets.get(address)
        return outlet if outlet and outlet.up and outlet.route is not Route.ZEROMQ else None

    def tick(self, now: float) -> None:
        for outlet in list(self._outlets.values()):
            outlet.tick(now)

    def flush(self, now: float) -> None:
        """At the end of a turn: what was to leave together does."""
        for outlet in list(self._outlets.values()):
            outlet.flush(now)

    def release(self, key: Key) -> None:
        for outlet in self._outlets.values():
            outlet.release(key)

    def forget(self, address: str) -> None:
        """Nothing uses this address any more."""
        if outlet := self._outlets.pop(address, None):
            outlet.close()

    def close(self) -> None:
        for address in list(self._outlets):
            self.forget(address)
