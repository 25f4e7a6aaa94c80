"""Forecast of a rate: level, trend and daily season, each bounded.

Owns: which window of the past speaks for the present, and how far ahead it is carried on.
Must not: know workers; a rate is any amount per second.

Level and trend: a line through the longest window that no shorter one contradicts. A load that is steady, or changes
steadily, is averaged over half an hour and a step is seen in half a minute, with no smoothing constant to choose.
Season: what the same time of day brought on earlier days.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot, sqrt

from lanewise.policy.scaling_types import Season

WINDOWS_S = (30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0)
CONTRADICTION = 4.5  # standard errors at which a shorter window overrules a longer one
DOUBT = 2.5  # standard errors of a slope that chance may have made
MOST_GROWTH = 0.25  # of the present rate, up or down, that a trend may add until the horizon
MOST_SEASON = 0.5  # the same of the season

DAY_S = 86_400.0
SEASON_BINS = 96
SEASON_WEIGHT = 0.5  # of the newest day


@dataclass(frozen=True, slots=True)
class Sample:
    """One period: its length, the amount in it, and the variance of that amount (Σ of squares of its parts)."""

    seconds: float
    amount: float
    variance: float


@dataclass(frozen=True, slots=True)
class Forecast:
    value: float  # a second, at the horizon
    level: float  # a second, in the middle of the window
    error: float  # standard error of the level, and of what the trend adds to it
    window_s: float
    trend: float = 0.0  # what trend and season add, as a share of the level


def forecast(samples: Sequence[Sample], horizon_s: float, season_growth: float = 0.0) -> Forecast:
    """The rate `horizon_s` after the newest sample. `season_growth`: share that the season adds (0: no season)."""
    if not samples:
        return Forecast(0.0, 0.0, 0.0, 0.0)
    totals = _windows(samples)
    chosen = _choose(totals)
    seconds, amount, variance = totals[chosen]
    level, error = amount / seconds, sqrt(variance) / seconds
    slope, doubt = _slope(totals, chosen)
    if level <= 0:
        return Forecast(0.0, 0.0, error, seconds)
    seen = [part / span for span, part, _ in totals[: chosen + 1]]
    now = min(max(level + slope * seconds / 2, min(seen)), max(seen))  # a line through a step would overshoot it
    growth = min(max(slope * horizon_s / now, -MOST_GROWTH), MOST_GROWTH) if now > 0 else 0.0
    growth = max(growth, min(max(season_growth, -MOST_SEASON), MOST_SEASON)) if season_growth else growth
    value = now * (1 + growth)
    return Forecast(value, level, hypot(error, doubt * (seconds / 2 + horizon_s)), seconds, value / level - 1)


def _windows(samples: Sequence[Sample]) -> list[tuple[float, float, float]]:
    """(seconds, amount, variance) of the last 30 s, 60 s … as far as the samples go; one entry at least."""
    found: list[tuple[float, float, float]] = []
    seconds = amount = variance = 0.0
    wanted = iter(WINDOWS_S)
    want = next(wanted)
    for sample in reversed(samples):
        seconds += sample.seconds
        amount += sample.amount
        variance += sample.variance
        if seconds >= want * 0.999:
            found.append((seconds, amount, variance))
            following = next(wanted, None)
            if following is None:
                return found
            want = following
    if not found or found[-1][0] < seconds:
        found.append((seconds, amount, variance))
    return found


def _choose(totals: Sequence[tuple[float, float, float]]) -> int:
    """The longest window whose line no shorter window contradicts, judged by the larger of both variances."""
    for index in range(len(totals) - 1, 0, -1):
        seconds, amount, variance = totals[index]
        level, (slope, _) = amount / seconds, _slope(totals, index)
        if not any(
            abs(level + slope * (seconds - span) / 2 - short / span)
            > CONTRADICTION * sqrt(max(variance / seconds, spread / span) / span)
            for span, short, spread in totals[:index]
        ):
            return index
    return 0


def _slope(totals: Sequence[tuple[float, float, float]], index: int) -> tuple[float, float]:
    """Change per second and second across a window, younger against older half, and its standard error.

    The part of the change that chance may have made is taken off (after James and Stein), so that a slope comes and
    goes by degrees: one that counted in full from some significance on would move a count to and fro.
    """
    if not index:
        return 0.0, 0.0
    seconds, amount, variance = totals[index]
    young_s, young, _ = totals[index - 1]
    old_s = seconds - young_s
    change = young / young_s - (amount - young) / old_s
    error = sqrt(variance / seconds * (1 / young_s + 1 / old_s))
    if abs(change) <= DOUBT * error:
        return 0.0, 0.0
    part = 1 - (DOUBT * error / change) ** 2
    return part * change / (seconds / 2), part * error / (seconds / 2)


# ---------------------------------------------------------------- season


def learn(season: Season | None, at_s: float, seconds: float, amount: float) -> Season:
    """The season after one more period that ended at `at_s` (seconds of UTC)."""
    season = season or Season((-1.0,) * SEASON_BINS)
    index = _bin(at_s)
    if index != season.bin:
        season = replace(_close(season), bin=index, bin_sum=0.0, bin_seconds=0.0)
    return replace(
        season,
        bin_sum=season.bin_sum + amount,
        bin_seconds=season.bin_seconds + seconds,
        covered_s=season.covered_s + seconds,
    )


def _close(season: Season) -> Season:
    if season.bin < 0 or season.bin_seconds <= 0:
        return season
    rate, before = season.bin_sum / season.bin_seconds, season.rates[season.bin]
    mixed = rate if before < 0 else SEASON_WEIGHT * rate + (1 - SEASON_WEIGHT) * before
    return replace(season, rates=(*season.rates[: season.bin], mixed, *season.rates[season.bin + 1 :]))


def growth(season: Season | None, at_s: float, horizon_s: float) -> float:
    """Share by which earlier days grew from this time of day to `horizon_s` later; 0 before a whole day was seen."""
    if season is None or season.covered_s < DAY_S or min(season.rates) < 0:
        return 0.0
    now, later = _rate(season, at_s), _rate(season, at_s + horizon_s)
    return later / now - 1 if now > 0 else 0.0


def _bin(at_s: float) -> int:
    return int(at_s % DAY_S / DAY_S * SEASON_BINS) % SEASON_BINS


def _rate(season: Season, at_s: float) -> float:
    """Between the middles of two bins."""
    place = at_s % DAY_S / DAY_S * SEASON_BINS - 0.5
    left = int(place // 1)
    share = place - left
    return (1 - share) * season.rates[left % SEASON_BINS] + share * season.rates[(left + 1) % SEASON_BINS]
