"""When a sequence ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanewise.engine.sequence import Sequence
from lanewise.request import FinishReason, Sampling

EOS, STOP, OTHER = 2, 7, 5


@pytest.mark.parametrize(
    ("outputs", "changes", "expected"),
    [
        ([OTHER], {}, None),
        ([EOS], {}, FinishReason.STOP),
        ([EOS], {"ignore_eos": True}, None),
        ([STOP], {"stop_token_ids": frozenset({STOP})}, FinishReason.STOP),
        ([STOP], {"stop_token_ids": frozenset({STOP}), "ignore_eos": True}, FinishReason.STOP),
        ([OTHER, EOS], {"min_tokens": 2}, None),
        ([OTHER, OTHER, EOS], {"min_tokens": 2}, FinishReason.STOP),
        ([OTHER] * 4, {}, FinishReason.LENGTH),
        ([OTHER] * 3 + [EOS], {}, FinishReason.STOP),  # STOP wins over LENGTH
        ([OTHER] * 3, {"max_tokens": 9}, None),
        ([OTHER] * 5, {"max_tokens": 9}, FinishReason.LENGTH),  # the context is full
    ],
)
def test_finish(outputs, changes, expected):
    sampling = Sampling(**{"max_tokens": 4, **changes})
    seq = Sequence(("r", 1), [1, 1, *outputs], 2, sampling, frozenset({EOS}), max_context_tokens=7)
    assert seq.finish(outputs[-1]) == expected
    assert seq.num_output == len(outputs)


@given(
    outputs=st.integers(0, 3), most=st.integers(1, 4), context=st.none() | st.integers(3, 7), prompt=st.integers(1, 3)
)
def test_ends_next_says_so_exactly_when_any_token_is_the_last(outputs, most, context, prompt):
    seq = Sequence(("r", 1), [9] * (prompt + outputs), prompt, Sampling(max_tokens=most), max_context_tokens=context)
    said = seq.ends_next
    seq.ids.append(9)
    assert said == (seq.finish(9) is not None)
