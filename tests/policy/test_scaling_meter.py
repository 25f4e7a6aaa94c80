"""The sums that routers and the simulator keep for scaling."""

from __future__ import annotations

from lanewise.policy.cost import CostModel
from lanewise.policy.scaling_meter import DemandMeter

COST = CostModel(compute_s=1e-3, weights_s=0.0, attention_s=0.0, kv_read_s=0.0, launch_s=0.0)


def test_sums_of_what_was_placed_and_ended() -> None:
    meter = DemandMeter(0.5, 0.05, lambda: COST)
    meter.placed("a", 100, 64)
    meter.placed("a", 100, 64)  # a second attempt is no second request
    meter.placed("b", 1000, 0)  # alone it takes a second: no scaling makes it on time
    for _ in range(3):
        meter.token()
    meter.ended("a", 0.6, 0.06)
    meter.ended("b", 2.0, None)
    meter.ended("never placed", None, None)
    total = meter.total()
    assert (total.requests, total.prompt_tokens, total.uncached_tokens) == (2, 1100, 1036)
    assert total.uncached_squares == 36**2 + 1000**2
    assert total.attended == 36 * (64 + 18) + 1000 * 500
    assert (total.output_tokens, total.finished) == (3, 2)
    assert (total.able, total.able_tokens, total.able_squares) == (1, 36, 36**2)
    assert total.able_attended == 36 * (64 + 18)
    assert (total.attainable, total.ttft_late, total.tpot_late) == (1, 1, 1)
    assert (total.refused, total.returned) == (0, 0)


def test_a_request_that_gave_no_token_is_not_late() -> None:
    meter = DemandMeter(0.5, 0.05, lambda: None)
    meter.placed("cancelled", 10, 0)
    meter.ended("cancelled", None, None)
    assert (meter.total().requests, meter.total().finished) == (1, 0)


def test_the_refused_are_demand_and_late_and_count_once() -> None:
    meter = DemandMeter(0.5, 0.05, lambda: COST)
    meter.refused(100, 64)
    meter.refused(100, 64, again=True)  # it was told to wait, and came too early
    meter.refused(1000, 0)  # would never have been on time
    total = meter.total()
    assert (total.requests, total.uncached_tokens, total.able_tokens) == (2, 1036, 36)
    assert (total.refused, total.attainable, total.ttft_late, total.finished) == (2, 1, 1, 0)
    meter.placed("a", 100, 64, again=True)
    meter.ended("a", 0.1, 0.04)
    total = meter.total()
    assert (total.requests, total.returned, total.finished) == (2, 1, 1)
    assert (total.attainable, total.ttft_late, total.tpot_late) == (1, 1, 0)  # late once, when it was sent away
