"""Moves prefill instances between lanes: asks the lane policy every few seconds and proposes its one move.

Owns: the period, what it has seen of each instance's lane, and the proposal on the wire.
Must not: decide (policy/lanes.py does) or believe that a move has happened before the worker says so. The worker
compares the generation, so several routers may propose at once and one of them wins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import structlog

from lanewise.fleet import Lane, WorkerView
from lanewise.policy.lanes import PERIOD_S, LaneController, LaneMove, first_lane
from lanewise.router.roster import Roster
from lanewise.rpc import lanewise_pb2 as pb

log = structlog.get_logger(__name__)


class LaneKeeper:
    """One per router and only where lanes over instances are asked for."""

    def __init__(self, roster: Roster, ttft_target_s: float) -> None:
        self._roster = roster
        self._target_s = ttft_target_s
        self._controllers: dict[str, LaneController] = {}  # by model
        self._seen: dict[str, tuple[int, float]] = {}  # incarnation -> lane generation, and since when we see it

    def lane_of(self, model: str, uncached_tokens: int, prompt_tokens: int) -> Lane:
        """The lane of a request that arrives now."""
        return self._controller(model).lane_of(uncached_tokens, prompt_tokens)

    async def run(self) -> None:
        """Owned task."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.propose(time.monotonic())

    def propose(self, now: float) -> list[LaneMove]:
        """At most one move per model; returns what was proposed."""
        models = {session.identity.model for session in self._roster.sessions() if session.identity is not None}
        proposed = []
        for model in sorted(models):
            views = self._aged(self._roster.snapshot(model).prefill, now)
            move = first_lane(views) or self._controller(model).propose(views)
            session = self._roster.session(move.incarnation) if move is not None else None
            if move is None or session is None:
                continue
            log.info("lane_proposed", worker=move.incarnation, lane=move.to.value, reason=move.reason)
            wire = pb.SetLane(lane=move.to.value, expected_generation=move.generation)
            session.send(pb.RouterMessage(set_lane=wire))
            proposed.append(move)
        return proposed

    def _controller(self, model: str) -> LaneController:
        return self._controllers.setdefault(model, LaneController(self._target_s))

    def _aged(self, views: Sequence[WorkerView], now: float) -> list[WorkerView]:
        """An idle worker repeats its last statistics, so the time since its move is also counted here."""
        gone = self._seen.keys() - {view.identity.incarnation for view in views}
        for incarnation in gone:
            if self._roster.session(incarnation) is None:
                del self._seen[incarnation]
        aged = []
        for view in views:
            incarnation, generation = view.identity.incarnation, view.stats.lane_generation
            if self._seen.get(incarnation, (None, 0.0))[0] != generation:
                self._seen[incarnation] = (generation, now)
            age = max(view.stats.lane_age_s, now - self._seen[incarnation][1])
            aged.append(replace(view, stats=replace(view.stats, lane_age_s=age)))
        return aged
