"""Asks the routing policy for a pair, with everything this router knows at this moment.

Owns: turning sessions and a flight into the policy's arguments. Must not: score, keep flights, or act.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lanewise.config import RouterConfig
from lanewise.fleet import Lane, Pair, WorkerIdentity
from lanewise.policy.routing import RouteRequest, choose_pair
from lanewise.router.flight import Flight
from lanewise.router.lanes import LaneKeeper
from lanewise.router.roster import Roster


@dataclass(frozen=True, slots=True)
class Placement:
    pair: Pair
    decode: WorkerIdentity
    hits: Mapping[str, int]  # cached prefix tokens by incarnation

    @property
    def cached_tokens(self) -> int:
        """Cached prefix of the worker that computes the prompt."""
        return self.hits.get(self.pair.prefill or self.pair.decode, 0)


class Placer:
    def __init__(self, config: RouterConfig, roster: Roster) -> None:
        self._config = config
        self._roster = roster
        learned = config.instance_lanes == "learned"
        self.lanes = LaneKeeper(roster, config.ttft_target_s) if learned else None  # None: all serve every length
        self._routes = 0  # the policy's seed: gives equal workers turns

    def choose(self, flight: Flight, now: float) -> Placement | None:
        """The pair for the next attempt of this flight; None when no worker can take it now."""
        order = flight.order
        ids = (*order.prompt_ids, *flight.output_ids) if flight.output_ids else order.prompt_ids
        hits = self._roster.cached_tokens(ids, order.tenant_salt)
        fleet = self._roster.snapshot(order.model, flight.fingerprint)
        lane = Lane.ANY
        if self.lanes is not None and len(fleet.prefill) > 1:
            best_hit = max((hits.get(view.identity.incarnation, 0) for view in fleet.prefill), default=0)
            lane = self.lanes.lane_of(order.model, len(ids) - best_hit, len(ids))
        # Last the avoided workers: when nobody else is there, they are better than none.
        for exclude in dict.fromkeys((flight.exclude, frozenset[str]())):
            self._routes += 1
            request = RouteRequest(
                prompt_tokens=len(ids),
                cached_tokens=hits,
                ttft_target_s=order.ttft_target_s or self._config.ttft_target_s,
                disaggregation=self._config.disaggregation,
                tpot_target_s=self._config.tpot_target_s,
                max_tokens=order.sampling.max_tokens,
                exclude=exclude,
                lane=lane,
                kv_bytes_per_token=fleet.decode[0].identity.kv_bytes_per_token if fleet.decode else 0,
                sampled=any(view.stats.routers > 1 for view in fleet.decode[:1]),
            )
            pair = choose_pair(request, fleet, now, self._routes)
            if pair is not None:
                decode = next(v.identity for v in fleet.decode if v.identity.incarnation == pair.decode)
                return Placement(pair, decode, hits)
        return None

    def any_pair(self, now: float) -> bool:
        """Whether some request could be placed now."""
        models = {session.identity.model for session in self._roster.sessions() if session.identity is not None}
        request = RouteRequest(prompt_tokens=1, disaggregation=self._config.disaggregation)
        return any(choose_pair(request, self._roster.snapshot(model), now, 0) for model in models)
