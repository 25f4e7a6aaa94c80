"""The sums a router keeps for scaling."""

from __future__ import annotations

from lanewise.policy.cost import CostModel
from lanewise.router.demand import DemandMeter

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
    wire = meter.to_wire()
    assert (wire.requests, wire.prompt_tokens, wire.uncached_tokens) == (2, 1100, 1036)
    assert wire.uncached_squares == 36**2 + 1000**2
    assert wire.attended == 36 * (64 + 18) + 1000 * 500
    assert (wire.output_tokens, wire.finished) == (3, 2)
    assert (wire.able, wire.able_tokens, wire.able_squares) == (1, 36, 36**2)
    assert wire.able_attended == 36 * (64 + 18)
    assert (wire.attainable, wire.ttft_late, wire.tpot_late) == (1, 1, 1)


def test_a_request_that_gave_no_token_is_not_late() -> None:
    meter = DemandMeter(0.5, 0.05, lambda: None)
    meter.placed("cancelled", 10, 0)
    meter.ended("cancelled", None, None)
    assert (meter.to_wire().requests, meter.to_wire().finished) == (1, 0)
