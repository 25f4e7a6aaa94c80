"""Passes that are launched before the result of the one before is taken: the same tokens, and the same account."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lanewise.engine.runner import Engine, Pending, Work
from lanewise.engine.sampler import Sampled
from lanewise.engine.sequence import Sequence
from lanewise.request import Sampling
from tests.engine.test_sampler import MIXED

KEY = b"l" * 32


def sequences(count: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(7)
    lengths = [3 + 11 * index for index in range(count)]
    return [
        Sequence(
            (f"r{index}", 1),
            torch.randint(0, 512, (length,), generator=generator).tolist(),
            length,
            replace(MIXED[index % len(MIXED)], seed=MIXED[index % 5].seed ^ index, max_tokens=12 + index),
        )
        for index, length in enumerate(lengths)
    ]


def run(engine: Engine, seqs: list[Sequence], ahead: bool, chunk_tokens: int = 20) -> list[list[Sampled]]:
    """All to their end, with one launch out, or none, while the next is prepared."""
    said: dict[tuple[str, int], list[Sampled]] = {seq.key: [] for seq in seqs}
    out: list[tuple[list[Work], Pending]] = []
    while True:
        work = []
        for seq in seqs:
            new = min(seq.num_uncomputed, chunk_tokens)
            if not new and seq.num_ahead and not seq.ends_next:
                new = 1
            if new > 0 and seq.num_output < seq.sampling.max_tokens:
                assert engine.pool.ensure(seq, seq.num_launched + new)
                work.append(Work(seq, new))
        if work:
            out.append((work, engine.launch(work, after=out[-1][1] if out else None)))
        while len(out) > (1 if ahead and work else 0):
            done, pending = out.pop(0)
            for item, sampled in zip(done, pending.result(), strict=True):
                if sampled is not None:
                    item.seq.ids.append(sampled.token_id)
                    said[item.seq.key].append(sampled)
        if not work:
            break
    for seq in seqs:
        assert (seq.num_ahead, seq.num_computed) == (0, len(seq.ids) - 1)
        engine.pool.release(seq)
    return list(said.values())


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_launch_ahead_samples_what_a_step_samples(kernels, build_model, load):
    """Every way of sampling, log probabilities too, in chunks beside those that decode."""
    engine = load(build_model("qwen3")[0], kernels=kernels)
    plain, ahead = (run(engine, sequences(8), flag) for flag in (False, True))
    assert [len(tokens) for tokens in ahead] == [12 + index for index in range(8)]
    assert ahead == plain


def prepared(engine: Engine) -> Sequence:
    seq = Sequence(("a", 1), [1, 2, 3], 3, Sampling(max_tokens=9, temperature=0.0))
    assert engine.pool.ensure(seq, 8)
    return seq


def test_what_cannot_be_continued_is_refused(small_engine):
    seq, other = prepared(small_engine), Sequence(("b", 1), [5, 6], 2, Sampling(max_tokens=9, temperature=0.0))
    assert small_engine.pool.ensure(other, 4)
    part = small_engine.launch([Work(seq, 2)])
    with pytest.raises(ValueError, match="cannot compute 2 of 1"):
        small_engine.launch([Work(seq, 2)], after=part)
    with pytest.raises(ValueError, match="no id is left"):
        small_engine.step([Work(replace(seq, ids=[1, 2]), 1)])
    first = small_engine.launch([Work(seq, 1), Work(other, 1)], after=part)
    second = small_engine.launch([Work(other, 1)], after=first)  # which does not sample for `seq`
    with pytest.raises(ValueError, match="does not sample all"):
        small_engine.launch([Work(seq, 1)], after=second)
    with pytest.raises(RuntimeError, match="0 tokens computed where the launch had 2"):
        first.result()
    assert part.result() == [None]
    sampled, nothing = first.result()
    assert sampled is not None
    assert nothing is None
    with pytest.raises(RuntimeError, match="3 tokens computed"):
        first.result()
    assert second.result()[0] is not None
    for each in (seq, other):
        assert each.num_ahead == 0
        small_engine.pool.release(each)


def test_kv_of_an_id_that_nobody_took_is_not_counted(small_engine):
    """64 tokens are computed, of which the host knows 63: they are no unit of the cache."""
    ids = torch.randint(0, 512, (63,), generator=torch.Generator().manual_seed(1)).tolist()
    seq = Sequence(("a", 1), ids, 63, Sampling(max_tokens=9, temperature=0.0))
    assert small_engine.pool.ensure(seq, 64)
    first = small_engine.launch([Work(seq, 63)])
    second = small_engine.launch([Work(seq, 1)], after=first)
    small_engine.pool.seal(seq, KEY)
    first.result()  # cancelled meanwhile: its token is dropped
    second.result()
    assert (seq.num_computed, seq.num_ahead) == (63, 0)
    small_engine.pool.seal(seq, KEY)
    assert small_engine.pool.match([*ids, 1, 2], KEY) == 0
    assert small_engine.pool.audit([seq]) == []
    small_engine.pool.release(seq)


def test_an_empty_launch_is_over(small_engine):
    pending = small_engine.launch([])
    assert pending.done
    assert pending.result() == []
