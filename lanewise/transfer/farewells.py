"""ABORTs of a sender that the receiver has not acknowledged yet: said again a few times. Pure.

Must not: decide that a transfer ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from lanewise.transfer import messages as m
from lanewise.transfer.protocol import Action, Send
from lanewise.transfer.records import Key, Timers

LinkId = tuple[str, str]
"""(address, incarnation). Links of several incarnations may share an address: only one of them can answer."""


@dataclass(slots=True)
class _Farewell:
    message: m.Abort
    tries: int
    at: float


class Farewells:
    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._open: dict[LinkId, dict[Key, _Farewell]] = {}

    @property
    def idle(self) -> bool:
        return not any(self._open.values())

    @property
    def deadline(self) -> float:
        return min((each.at for group in self._open.values() for each in group.values()), default=float("inf"))

    def say(self, link_id: LinkId, message: m.Abort, now: float) -> Action:
        each = _Farewell(message, 1, now + self._timers.abort_ack_s)
        self._open.setdefault(link_id, {})[message.key] = each
        return Send(link_id[0], message)

    def heard(self, link_id: LinkId, key: Key) -> None:
        """ABORT_ACK came."""
        self._open.get(link_id, {}).pop(key, None)

    def forget(self, link_id: LinkId) -> None:
        """The link is gone, and with it whoever could be told."""
        self._open.pop(link_id, None)

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for link_id, group in self._open.items():
            for key, each in list(group.items()):
                if now < each.at:
                    continue
                if each.tries >= self._timers.abort_tries:
                    del group[key]  # the receiver's lease and its own view of the dead link free the rest
                    continue
                each.tries += 1
                each.at = now + self._timers.abort_ack_s
                actions.append(Send(link_id[0], each.message))
        return actions
