"""The sampler: filters against a naive reference, penalties, logprobs; a token depends on ids and Sampling alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lanewise.engine.sampler import filter_logits, sample
from lanewise.engine.sequence import Sequence
from lanewise.request import Sampling


def naive_kept(logits: list[float], sampling: Sampling) -> set[int]:
    """Entries that survive, by the definitions: each filter works on what the one before left."""
    kept = set(range(len(logits)))
    if 0 < sampling.top_k < len(logits):
        last = sorted(logits, reverse=True)[sampling.top_k - 1]
        kept = {i for i in kept if logits[i] >= last}
    if sampling.top_p < 1.0:
        total = sum(math.exp(logits[i]) for i in kept)
        mass = 0.0
        for i in sorted(kept, key=lambda i: -logits[i]):
            mass += math.exp(logits[i]) / total
            assume(abs(mass - sampling.top_p) > 1e-5)
            if mass >= sampling.top_p:
                kept = {j for j in kept if logits[j] >= logits[i]}
                break
    if sampling.min_p > 0.0:
        best = max(logits[i] for i in kept)
        ratios = {i: math.exp(logits[i] - best) for i in kept}
        assume(all(abs(ratio - sampling.min_p) > 1e-5 for ratio in ratios.values()))
        kept = {i for i in kept if ratios[i] >= sampling.min_p}
    return kept


@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=30),
    top_k=st.integers(0, 32),
    top_p=st.sampled_from([0.001, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_filters_keep_what_the_definitions_keep(logits, top_k, top_p, min_p):
    sampling = Sampling(max_tokens=1, top_k=top_k, top_p=top_p, min_p=min_p)
    assume(min_p < 1.0 or len(set(logits)) == len(logits))
    row = torch.tensor(logits)
    # At 1.0 the naive ratios lie on the border: only the best entry stays.
    best = {max(range(len(logits)), key=logits.__getitem__)}
    expected = naive_kept(logits, sampling) if min_p < 1.0 else best
    filter_logits(row, sampling)
    assert {i for i, value in enumerate(row.tolist()) if value > -math.inf} == expected
    assert all(row[i] == logits[i] for i in expected)


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_top_p_on_a_large_vocabulary(scale):
    """Peaked distributions take the short way over the likeliest entries, flat ones sort everything."""
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) * scale
    row = logits.clone()
    filter_logits(row, Sampling(max_tokens=1, top_p=0.9))
    kept = row > -math.inf
    probabilities = logits.double().softmax(0)
    assert probabilities[kept].sum() >= 0.9 - 1e-4
    assert probabilities[kept].sum() - probabilities[kept].min() < 0.9 + 1e-4
    assert probabilities[kept].min() >= probabilities[~kept].max()


def one(logits: list[float], sampling: Sampling, ids=(0,), num_prompt=1, eos=frozenset()) -> int:
    seq = Sequence(("r", 1), list(ids), num_prompt, sampling, eos)
    return sample(torch.tensor([logits]), [seq])[0].token_id


GREEDY = Sampling(max_tokens=9, temperature=0.0)


def test_bias_and_penalties():
    logits = [1.0, 3.0, 2.0, -1.0]
    assert one(logits, GREEDY) == 1
    assert one(logits, replace(GREEDY, logit_bias={3: 5.0})) == 3
    assert one(logits, replace(GREEDY, logit_bias={1: -100.0})) == 2
    assert one(logits, replace(GREEDY, repetition_penalty=2.0), ids=[1]) == 2  # the prompt counts
    assert one(logits, replace(GREEDY, presence_penalty=1.5), ids=[1]) == 1  # the prompt does not
    assert one(logits, replace(GREEDY, presence_penalty=1.5), ids=[0, 1]) == 2
    assert one(logits, replace(GREEDY, frequency_penalty=0.6), ids=[0, 1]) == 1
    assert one(logits, replace(GREEDY, frequency_penalty=0.6), ids=[0, 1, 1]) == 2
    assert one([-1.0, -1.5], replace(GREEDY, repetition_penalty=2.0), ids=[0]) == 1  # negative logits sink too


def test_min_tokens_masks_what_would_end_the_sequence():
    logits = [1.0, 3.0, 2.0]
    sampling = replace(GREEDY, min_tokens=2, stop_token_ids=frozenset({2, 999}))
    assert one(logits, sampling, ids=[0, 0], eos=frozenset({1})) == 0
    assert one(logits, sampling, ids=[0, 0, 0], eos=frozenset({1})) == 1
    assert one(logits, replace(sampling, ignore_eos=True), ids=[0, 0], eos=frozenset({1})) == 1


def test_logprobs_are_the_models_own():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    sampling = Sampling(max_tokens=1, temperature=0.7, top_k=1, logit_bias={3: 100.0}, logprobs=2)
    result = sample(logits, [Sequence(("r", 1), [0], 1, sampling)])[0]
    expected = logits[0].log_softmax(0)
    assert result.token_id == 3
    assert result.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in result.top] == [1, 2]
    assert [value for _, value in result.top] == pytest.approx([float(expected[1]), float(expected[2])])
    zero = sample(logits, [Sequence(("r", 1), [0], 1, replace(sampling, logprobs=0))])[0]
    assert (zero.logprob, zero.top) == (result.logprob, ())


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = Counter(
        sampled.token_id
        for sampled in sample(
            logits.expand(4000, 4),
            [Sequence(("r", 1), [0], 1, Sampling(max_tokens=1, temperature=0.5, seed=seed)) for seed in range(4000)],
        )
    )
    for token, probability in enumerate((logits / 0.5).softmax(0).tolist()):
        deviation = math.sqrt(4000 * probability * (1 - probability))
        assert abs(draws[token] - 4000 * probability) < 4.5 * deviation


MIXED = [
    Sampling(max_tokens=40, temperature=1.0, seed=11),
    Sampling(max_tokens=40, temperature=0.8, top_p=0.9, seed=2**64 - 1),
    Sampling(max_tokens=40, temperature=1.3, top_k=20, min_p=0.02, seed=7, min_tokens=9),
    Sampling(max_tokens=40, temperature=0.0, frequency_penalty=0.7, presence_penalty=0.1),
    Sampling(max_tokens=40, temperature=0.9, repetition_penalty=1.2, seed=11, logprobs=3, logit_bias={5: 2.0}),
]


@pytest.fixture
def sixteen(driver):
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in range(3, 99, 6)]
    samplings = [replace(MIXED[index % len(MIXED)], seed=MIXED[index % 5].seed ^ index) for index in range(16)]
    return prompts, samplings


def test_alone_and_in_a_batch_are_the_same(small_engine, driver, sixteen):
    together, alone = driver(concurrency=16), driver(concurrency=1, key=b"alone")
    outputs = together.run(small_engine, together.open(*sixteen))
    assert alone.run(small_engine, alone.open(*sixteen)) == outputs
    assert len({tuple(output) for output in outputs}) == 16


def test_resumed_requests_go_on_as_if_never_interrupted(small_engine, driver, sixteen):
    """Position, penalties and min/max tokens derive from prompt and output ids alone."""
    drive = driver()
    outputs = drive.run(small_engine, drive.open(*sixteen))
    resumed = drive.open(*sixteen)
    for index, (seq, output) in enumerate(zip(resumed, outputs, strict=True)):
        seq.ids += output[: 1 + index]
    assert drive.run(small_engine, resumed) == outputs
