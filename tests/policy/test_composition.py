"""Where a batch ends: at the end of a request, when that costs the others less than it gains."""

from __future__ import annotations

from collections.abc import Hashable

from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.policy.batching import Job
from lanewise.policy.composition import MOST_GROWTH, Batch
from lanewise.policy.profile import make_profile

COST = make_profile("qwen2.5-32b", "h200", 1).cost
PLANNED, MOST = 400, int(400 * MOST_GROWTH)


def _batch(arrivals_per_s: float = 0.0, planned: int = PLANNED, most: int = MOST) -> Batch:
    return Batch(COST, planned, most, arrivals_per_s, 0.0)


def _job(key: object, tokens: int, deadline: float = 9.0, context: int = 0) -> Job:
    return Job(str(key), 0.0, tokens, context, deadline)


def test_a_batch_grows_to_end_a_request_but_not_beyond_its_most() -> None:
    for offer in (Batch.add_on_time, Batch.add):
        batch = _batch()
        offer(batch, _job("a", PLANNED + 100))
        assert batch.chunks == [("a", PLANNED + 100)]
        batch = _batch()
        offer(batch, _job("a", MOST + 1))
        assert batch.chunks == [("a", PLANNED)]


def test_it_does_not_grow_where_many_would_wait() -> None:
    busy = _batch(arrivals_per_s=1000.0)
    busy.add_on_time(_job("a", PLANNED + 100))
    assert busy.tokens == PLANNED
    crowded = _batch()
    for key in range(60):
        crowded.add_on_time(_job(key, 5))
    crowded.add_on_time(_job("a", 300))
    assert crowded.tokens == PLANNED


offers = st.lists(
    st.tuples(st.integers(1, 3000), st.floats(0.02, 1.0), st.sampled_from((0, 4096)), st.booleans()),
    min_size=1,
    max_size=20,
)


@given(offers=offers, arrivals_per_s=st.sampled_from((0.0, 10.0, 300.0)), planned=st.integers(50, 1000))
@settings(max_examples=200, deadline=None)
def test_growing_makes_nobody_late_and_keeps_the_ceiling(
    offers: list[tuple[int, float, int, bool]], arrivals_per_s: float, planned: int
) -> None:
    most = 2 * planned
    batch = _batch(arrivals_per_s, planned, most)
    jobs: dict[Hashable, Job] = {}
    for key, (tokens, deadline, context, hopeful) in enumerate(offers):
        job = jobs[str(key)] = _job(key, tokens, deadline, context)
        if hopeful and COST.alone(tokens, context) <= deadline:
            batch.add_on_time(job)
        else:
            batch.add(_job(key, tokens, 0.0, context))
            jobs[str(key)] = _job(key, tokens, 0.0, context)
    assert batch.tokens <= most
    work = [(new, jobs[k].context_tokens, new == jobs[k].remaining_tokens) for k, new in batch.chunks]
    ends = [jobs[k].ttft_deadline_s for k, new in batch.chunks if new == jobs[k].remaining_tokens]
    on_time = [end for end in ends[1:] if end > 0]  # the first is taken unconditionally
    assert all(COST.prefill(work) <= end + 1e-3 for end in on_time)
