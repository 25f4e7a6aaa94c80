"""What no policy can beat on a workload: certificates for mean TTFT and attainment.

Owns: docs/design.md §7's bounds. m instances are relaxed to one server m times as fast, batches to their marginal work.
Must not: depend on how anything is scheduled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from lanewise.policy.cost import CostModel
from lanewise.sim.workload import Request


@dataclass(frozen=True, slots=True)
class Bound:
    """Mean TTFT is at least, attainment at most this."""

    mean_ttft_s: float
    attainment: float


def bound(
    requests: Sequence[Request], cached: Sequence[int], cost: CostModel, instances: int, target_s: float
) -> Bound:
    """The certificate for requests in arrival order; `cached` is the best prefix hit each could have."""
    if not requests:
        return Bound(0.0, 1.0)
    new = [max(request.prompt_tokens - hit, 1) for request, hit in zip(requests, cached, strict=True)]
    hits = [request.prompt_tokens - n for request, n in zip(requests, new, strict=True)]
    alone = [cost.alone(n, hit) for n, hit in zip(new, hits, strict=True)]
    work = [cost.work(n, hit) / instances for n, hit in zip(new, hits, strict=True)]
    release = [request.arrival_s for request in requests]
    mean = max(sum(alone) / len(alone), srpt_mean(release, work) + cost.start_s)
    possible = [i for i in range(len(requests)) if alone[i] <= target_s]
    kept = most_on_time([release[i] for i in possible], [work[i] for i in possible], target_s - cost.start_s)
    return Bound(mean, kept / len(requests))


def srpt_mean(release: Sequence[float], work: Sequence[float]) -> float:
    """Mean time in system under preemptive shortest remaining processing time: optimal on one machine."""
    heap: list[tuple[float, float]] = []  # (remaining, release)
    now = total = 0.0
    index, count = 0, len(release)
    while index < count or heap:
        if not heap:
            now = max(now, release[index])
        while index < count and release[index] <= now:
            heappush(heap, (work[index], release[index]))
            index += 1
        remaining, since = heappop(heap)
        until = release[index] if index < count else float("inf")
        if now + remaining <= until:
            now += remaining
            total += now - since
        else:
            heappush(heap, (remaining - (until - now), since))
            now = until
    return total / count


def most_on_time(release: Sequence[float], work: Sequence[float], relative_deadline: float) -> int:
    """The most jobs that can be on time when every deadline is release + the same constant.

    Kise, Ibaraki and Mine: serve in order of release; when one would be late, drop the job whose removal lets the last
    one end earliest. Removing job k moves those behind it forward by at most its work, and none before its release.
    """
    kept: list[list[float]] = []  # of the current busy period: [release, start, work]
    on_time = 0
    end = 0.0
    for arrival, seconds in zip(release, work, strict=True):
        if arrival >= end:
            on_time += len(kept)
            kept = []
            end = arrival
        kept.append([arrival, end, seconds])
        end += seconds
        if end > arrival + relative_deadline:
            end -= _drop_best(kept)
    return on_time + len(kept)


def _drop_best(kept: list[list[float]]) -> float:
    """Removes the job whose removal frees most; how much earlier the last one now ends."""
    best, freed = len(kept) - 1, kept[-1][2]
    room = float("inf")  # how far the jobs behind the one looked at can move forward
    for index in range(len(kept) - 1, -1, -1):
        arrival, start, seconds = kept[index]
        gain = min(seconds, room)
        if gain > freed:
            best, freed = index, gain
        room = min(room, start - arrival)
        if room <= freed:
            break
    shift = kept[best][2]
    del kept[best]
    for job in kept[best:]:
        shift = min(shift, job[1] - job[0])
        job[1] -= shift
    return freed
