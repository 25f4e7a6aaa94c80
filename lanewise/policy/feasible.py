"""Which waiting requests can still be on time together, and in which order to run them.

Owns: the Moore–Hodgson choice of whom to give up, and the order among those who are kept. Pure functions of numbers.
Must not: know batches, tokens or models.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

HORIZON = 256  # earliest deadlines looked at when a shorter job may overtake: bounds the cost of one decision


@dataclass(frozen=True, slots=True)
class Due:
    """Work with a deadline."""

    key: Hashable
    seconds: float
    deadline_s: float
    arrival_s: float


def keep_most(jobs: Sequence[Due], start_s: float) -> tuple[list[Due], list[Due]]:
    """(kept by deadline, given up by size): the largest set that can all be on time on one machine from `start_s` on.

    Moore–Hodgson: by deadline; when one would be late, give up the longest so far. Exact for jobs that are all here;
    those given up are judged anew at every batch, so a gap in the arrivals brings them back.
    """
    at = start_s
    longest: list[tuple[float, int]] = []
    ordered = sorted(jobs, key=lambda job: (job.deadline_s, job.seconds, job.arrival_s))
    dropped: set[int] = set()
    for index, job in enumerate(ordered):
        at += job.seconds
        heappush(longest, (-job.seconds, index))
        if at > job.deadline_s:
            seconds, out = heappop(longest)
            at += seconds
            dropped.add(out)
    kept = [job for index, job in enumerate(ordered) if index not in dropped]
    given_up = sorted((ordered[index] for index in dropped), key=lambda job: (job.seconds, job.arrival_s))
    return kept, given_up


def shortest_safe_first(kept: Sequence[Due], start_s: float, caution: float, until_s: float) -> list[Due]:
    """The kept jobs, least work first as long as those who are due earlier keep `caution` × that work as slack.

    Earliest deadline first keeps everyone on time but lets the short wait for the long; least work first is best for
    the mean but spends the slack of the long on whoever comes. Overtaking only where slack abounds is both. Only the
    first `until_s` seconds of work are ordered (more than one batch never runs); the rest follows by deadline.
    """
    rest, order, at = list(kept), [], start_s
    end = start_s + until_s
    while rest and at < end:
        best, slack, finish = 0, inf, at
        shortest = rest[0].seconds
        for index, job in enumerate(rest[:HORIZON]):
            if job.seconds < shortest and job.seconds * caution <= slack:
                best, shortest = index, job.seconds
            finish += job.seconds
            slack = min(slack, job.deadline_s - finish)
            if slack <= 0:
                break
        job = rest.pop(best)
        order.append(job)
        at += job.seconds
    return order + rest
