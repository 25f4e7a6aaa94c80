"""The sampler: filters against a naive reference, penalties, logprobs; a token depends on ids and Sampling alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lanewise.engine.carried import Carried
from lanewise.engine.sampler import Sampled, add_noise_together, draw, filter_logits, filter_rows
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
    # The form of a GPU, on a CPU, beside a row that keeps everything.
    rows = torch.tensor([logits, logits])
    filter_rows(rows, [Sampling(max_tokens=1), sampling])
    assert rows[0].tolist() == logits
    assert rows[1].tolist() == row.tolist()


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


def sample(logits: torch.Tensor, seqs: list[Sequence]) -> list[Sampled]:
    return draw(logits, seqs).result()


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


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(9),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 0.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {2: 1.5, 4: -1.0}]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.sampled_from([frozenset(), frozenset({1, 3})]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@given(
    rows=st.lists(
        st.tuples(SAMPLINGS, st.lists(st.integers(0, 11), min_size=1, max_size=6), st.booleans()), min_size=1
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_an_id_that_the_host_does_not_know_counts_as_any_other(rows, seed):
    """The newest id of some rows lies where the draw before left it: token and log probabilities are the same."""
    logits = torch.randn(len(rows), 12, generator=torch.Generator().manual_seed(seed)) * 2
    whole = [Sequence(("r", i), ids, 1, sampling) for i, (sampling, ids, _) in enumerate(rows)]
    ahead = [i for i, (_, ids, unknown) in enumerate(rows) if unknown and len(ids) > 1]
    known = [
        Sequence(("r", i), seq.ids[:-1] if i in ahead else seq.ids, 1, seq.sampling) for i, seq in enumerate(whole)
    ]
    tokens = torch.tensor([11, *(whole[i].ids[-1] for i in ahead)])
    carried = Carried(tokens, {row: place for place, row in enumerate(ahead, 1)})
    assert draw(logits, known, carried).result() == sample(logits, whole)


@given(rows=st.lists(SAMPLINGS, min_size=1, max_size=9), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_all_rows_at_once_draw_what_each_draws(rows, seed):
    """The form of a GPU, on a CPU: no answer of the device is needed for it. Rows that are greedy stay as they are."""
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(seed))
    plain = [Sampling(9, s.temperature, s.top_p, s.top_k, s.min_p, seed=s.seed) for s in rows]
    seqs = [Sequence(("r", i), [0] * (1 + i), 1, sampling) for i, sampling in enumerate(plain)]
    noisy = logits.clone()
    positions = {i: len(seq.ids) for i, seq in enumerate(seqs) if seq.sampling.temperature > 0}
    if positions:
        add_noise_together(noisy, seqs, positions)
    assert noisy.argmax(-1).tolist() == [sampled.token_id for sampled in sample(logits, seqs)]
    assert all(torch.equal(noisy[i], logits[i]) for i in range(len(rows)) if i not in positions)


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
