"""What Explain tells of a request: its steps, in words.

Owns: the steps of the requests that ended last. Must not: grow without bound.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

KEPT = 1024


@dataclass(frozen=True, slots=True)
class Trail:
    started_at: float
    steps: tuple[tuple[float, int, str, str], ...]  # (when, epoch, what, detail)


class Trails:
    def __init__(self) -> None:
        self._trails: OrderedDict[str, Trail] = OrderedDict()

    def keep(self, request_id: str, trail: Trail) -> None:
        self._trails[request_id] = trail
        if len(self._trails) > KEPT:
            self._trails.popitem(last=False)

    def get(self, request_id: str) -> Trail | None:
        return self._trails.get(request_id)
