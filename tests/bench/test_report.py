"""Every formula of the report, on answers with known times."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanewise.bench.drive import Sample
from lanewise.bench.report import Slo, met, percentile, rows, spread_ms, summarise, table, times
from lanewise.bench.targets import Answer
from lanewise.bench.workload import Ask


def sample(
    index: int, at: float, events: list[float], tokens: int | None = None, label: str = "64", **more: object
) -> Sample:
    answer = Answer(at, event_s=events, end_s=events[-1] if events else at + 1.0, output_tokens=tokens, **more)  # type: ignore[arg-type]
    return Sample(Ask(index, at, 64, 4, label), at, answer)


def test_times_of_one_answer() -> None:
    found = times(sample(0, 10.0, [10.5, 10.6, 10.8], tokens=4))
    assert found is not None
    assert found.ttft_s == pytest.approx(0.5)
    assert found.tpot_s == pytest.approx(0.1)  # 0.3 s for 3 tokens after the first, however many events brought them
    assert found.itl_s == pytest.approx((0.1, 0.2))
    assert found.e2e_s == pytest.approx(0.8)
    alone = times(sample(0, 10.0, [10.5], tokens=1))
    assert alone is not None
    assert alone.tpot_s is None


def test_ttft_counts_from_the_schedule() -> None:
    late = Sample(Ask(0, 0.0, 1, 1, "1"), 10.0, Answer(10.3, event_s=[10.5], end_s=10.5))
    found = times(late)
    assert found is not None
    assert found.ttft_s == pytest.approx(0.5)
    assert late.late_s == pytest.approx(0.3)


@given(st.lists(st.floats(0, 1e6), min_size=2))
def test_percentiles_are_linear_between_ranks(values: list[float]) -> None:
    ordered = sorted(values)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive")  # the same definition, by another hand
    for percent in (1, 50, 90, 99):
        assert percentile(ordered, percent) == pytest.approx(cuts[percent - 1], rel=1e-9, abs=1e-6)


def test_spread() -> None:
    assert spread_ms([]) is None
    assert spread_ms([0.001]) == {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0, "max": 1.0}


def test_summary() -> None:
    samples = [
        sample(0, 0.0, [0.1, 0.2, 0.3], tokens=3),
        sample(1, 1.0, [1.9, 2.0], tokens=2, label="1536"),
        sample(2, 2.0, [], error="HTTP 429 OVERLOADED", detail="queue is long"),
        sample(3, 3.0, [3.1, 4.0], tokens=2),
        sample(4, 3.5, []),  # ended well and brought nothing: not a success
    ]
    report = summarise(samples, Slo(0.4, 0.2))
    assert (report["requests"], report["succeeded"], report["failed"]) == (5, 3, 2)
    assert report["errors"] == {
        "HTTP 429 OVERLOADED": {"count": 1, "example": "queue is long"},
        "no tokens": {"count": 1, "example": ""},
    }
    assert report["duration_s"] == 4.5
    assert report["output_tokens"] == 7
    assert report["output_tokens_per_s"] == pytest.approx(7 / 4.5, abs=1e-3)
    assert set(report["ttft_ms_by_prompt"]) == {"64", "1536"}
    # Only request 0 keeps both; 1 is late, 3 slow, and what failed misses too.
    assert report["slo"] == {"ttft_ms": 400.0, "tpot_ms": 200.0, "attainment": 0.2, "goodput_rps": round(1 / 4.5, 3)}
    text = table(report)
    for expected in ("TTFT ms", "  prompt 1536", "goodput", "HTTP 429 OVERLOADED: 1 (queue is long)", "no tokens: 1"):
        assert expected in text
    recorded = rows(samples)
    assert [row["error"] for row in recorded] == [None, None, "HTTP 429 OVERLOADED", None, None]
    assert recorded[1]["ttft_ms"] == 900.0


def test_nothing_succeeded() -> None:
    report = summarise([sample(0, 0.0, [], error="connect")], Slo())
    assert report["ttft_ms"] is None
    assert "slo" not in report
    assert "connect: 1" in table(report)


def test_targets_that_are_not_set_are_kept() -> None:
    found = times(sample(0, 0.0, [0.5], tokens=1))
    assert met(found, Slo())
    assert met(found, Slo(None, 0.001))
    assert not met(found, Slo(0.4, None))
    assert not met(None, Slo())
