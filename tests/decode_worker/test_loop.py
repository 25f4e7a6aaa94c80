"""The decode loop with a real engine: the same answers step by step, a step ahead, and on a device that is late."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from lanewise.decode_worker.room import Phase
from lanewise.engine.runner import Engine
from lanewise.request import FinishReason, Mode, Sampling, Submission
from tests.decode_worker.rig import Prefiller, Rig, alone, load, submission

GREEDY = Sampling(max_tokens=24, temperature=0.0)
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": Sampling(max_tokens=24, temperature=1.0, seed=5),
    "filtered": Sampling(max_tokens=24, temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=6),
    "penalties": Sampling(max_tokens=24, temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.5, seed=7),
    "presence": replace(GREEDY, presence_penalty=0.7, logit_bias={3: 1.0, 9: -2.0}),
    "logprobs": Sampling(max_tokens=24, temperature=0.7, seed=8, logprobs=3),
    "min_tokens": replace(GREEDY, min_tokens=10, stop_token_ids=frozenset(range(0, 512, 2))),
    "stop": Sampling(max_tokens=200, temperature=1.0, seed=9, stop_token_ids=frozenset(range(0, 512, 12))),
    "one token": replace(GREEDY, max_tokens=1),
    "two tokens": replace(GREEDY, max_tokens=2),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(1, 512) for _ in range(length)]


def test_each_way_of_sampling_says_what_it_says_alone(mode: str, make_rig: Callable[..., Rig], reference: Engine):
    """All at once, prompts in chunks of other lengths than pages, beside those that decode already."""
    rig = make_rig(mode, max_batch_tokens=37)
    asked = [
        submission(f"{name} {length}", prompt(length, length), sampling)
        for name, sampling in SAMPLINGS.items()
        for length in (1, 70)
    ]
    for index, each in enumerate(asked):
        rig.submit(each)
        if index % 4 == 3:
            rig.round()
    rig.finish()
    assert rig.most_out == (0 if mode == "plain" else 1)
    for each in asked:
        found, expected = rig.answers[each.request_id].tokens, alone(reference, each)
        assert [token.token_id for token in found] == [token.token_id for token in expected], each.request_id
        assert found == expected
    finishes = {rig.answers[each.request_id].finish for each in asked}
    assert finishes == {FinishReason.STOP, FinishReason.LENGTH}


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_out(make_rig: Callable[..., Rig]):
    rig = make_rig("late")
    answer = rig.submit(submission("a", prompt(9), GREEDY))
    rig.round()  # the prompt
    assert len(rig.loop._steps) == 1
    assert answer.tokens == []
    rig.round()  # the second token's step is launched, the first token comes
    (attempt,) = rig.loop.attempts.values()
    assert len(answer.tokens) == len(rig.loop._steps) == 1
    assert (attempt.seq.num_computed, attempt.seq.num_ahead, len(attempt.seq.ids)) == (9, 1, 10)
    rig.finish()
    assert len(answer.tokens) == 24


def test_the_end_of_text_ends(mode: str, make_rig: Callable[..., Rig], reference: Engine):
    """Which is known when one more step has been launched; nothing of that is seen."""
    rig = make_rig(mode)
    ends = [
        submission(f"r{seed}", prompt(5, seed), Sampling(60, 1.0, seed=seed, logit_bias={0: 4.5})) for seed in range(12)
    ]
    for each in ends:
        rig.submit(each)
    rig.finish()
    for each in ends:
        assert rig.answers[each.request_id].tokens == alone(reference, each)
    stopped = [a for a in rig.answers.values() if a.finish is FinishReason.STOP]
    assert len(stopped) > 6
    assert all(answer.ids[-1] == 0 for answer in stopped)


def test_the_length_of_the_context_ends(mode: str, make_rig: Callable[..., Rig], reference: Engine):
    rig = make_rig(mode)
    most = rig.engine.max_context_tokens
    asked = submission("long", prompt(most - 5), replace(GREEDY, max_tokens=50))
    rig.submit(asked)
    rig.finish()
    assert len(rig.answers["long"].tokens) == 5
    assert rig.answers["long"].tokens == alone(reference, asked)


@pytest.mark.parametrize("rounds", range(7))
def test_a_cancelled_request_gives_its_pages_back(
    rounds: int, mode: str, make_rig: Callable[..., Rig], reference: Engine
):
    """At every moment of its life; whoever takes them next is not disturbed, though a launch may still use them."""
    rig = make_rig(mode, 192, max_batch_tokens=32)
    long = replace(GREEDY, max_tokens=60)
    rig.submit(submission("gone", prompt(60, 1), long))
    for _ in range(rounds):
        rig.round()
    rig.cancel("gone")
    asked = [submission(f"next {seed}", prompt(50, seed), long) for seed in (2, 3)]
    for each in asked:
        rig.submit(each)
    said = len(rig.answers["gone"].tokens)
    rig.finish()
    assert len(rig.answers["gone"].tokens) == said
    for each in asked:
        assert rig.answers[each.request_id].tokens == alone(reference, each)
    again = submission("again", prompt(60, 1), long)
    rig.submit(again)  # from whatever is cached of it
    rig.finish()
    assert rig.answers["again"].tokens == alone(reference, again)


def test_a_deadline_ends_it_once(mode: str, make_rig: Callable[..., Rig]):
    rig = make_rig(mode)
    answer = rig.submit(submission("late", prompt(20), replace(GREEDY, max_tokens=500), deadline_s=1000.0))
    rig.until(lambda: len(answer.tokens) > 3)
    rig.now += 2000.0
    said = len(answer.tokens)
    rig.finish()
    assert len(answer.tokens) == said
    assert answer.failures == ["the deadline passed on the worker"]


def test_a_newer_attempt_takes_over(mode: str, make_rig: Callable[..., Rig], reference: Engine):
    rig = make_rig(mode)
    asked = submission("r", prompt(80), GREEDY)
    first = rig.submit(asked)
    rig.until(lambda: len(first.tokens) > 3)
    resumed = replace(asked, epoch=2, resumed_output_ids=tuple(first.ids))
    second = rig.submit(resumed)  # the first is told nothing from now on
    rig.finish()
    assert first.tokens + [replace(token, epoch=1) for token in second.tokens] == alone(reference, asked)


def test_drained_and_given_back(mode: str, make_rig: Callable[..., Rig]):
    rig = make_rig(mode)
    open_ones = [rig.submit(submission(f"r{i}", prompt(30, i), replace(GREEDY, max_tokens=400))) for i in range(3)]
    rig.until(lambda: all(answer.tokens for answer in open_ones))
    rig.loop.drain()
    refused = rig.submit(submission("late", prompt(3), GREEDY))
    rig.round()
    assert refused.failures == ["this worker is draining"]
    rig.loop.give_back()
    rig.finish()
    assert [answer.failures for answer in open_ones] == [["this worker stops"]] * 3


def test_preempted_requests_say_what_they_say_alone(mode: str, make_rig: Callable[..., Rig], reference: Engine):
    """Four of 144 tokens each in a pool of 304: admitted, since recent answers were short."""
    rig = make_rig(mode, 304)
    for index in range(24):
        rig.submit(submission(f"short {index}", prompt(3, index), replace(GREEDY, max_tokens=2)))
    rig.finish()
    asked = [submission(f"r{i}", prompt(64, i), Sampling(80, 0.9, seed=i, ignore_eos=True)) for i in range(4)]
    for each in asked:
        rig.submit(each)
    rig.finish()
    for each in asked:
        assert rig.answers[each.request_id].tokens == alone(reference, each)
    assert rig.loop._preemptions >= 1, "the pool was never short, so this test shows nothing"


def test_more_run_than_a_step_takes(mode: str, make_rig: Callable[..., Rig], reference: Engine):
    rig = make_rig(mode, max_running=2)
    asked = [submission(f"r{i}", prompt(10 + i, i), GREEDY) for i in range(7)]
    for each in asked:
        rig.submit(each)
    rig.finish()
    for each in asked:
        assert rig.answers[each.request_id].tokens == alone(reference, each)


def test_kv_arrives_beside_those_that_decode(mode: str, make_rig: Callable[..., Rig], model, reference: Engine):
    """Over the real channel, into pages that others have just given back."""
    rig = make_rig(mode, 512)
    prefiller = Prefiller(load(model, 8192))
    try:
        beside = [submission(f"local {i}", prompt(20 + i, i), replace(GREEDY, max_tokens=60)) for i in range(3)]
        for each in beside:
            rig.submit(each)
        arriving: list[Submission] = []
        expected = {}
        for number in range(6):
            asked = submission(
                f"sent {number}",
                prompt(90, 100 + number),
                Sampling(30, 0.8, seed=number, ignore_eos=True),
                mode=Mode.DECODE,
            )
            rig.submit(asked)
            rig.round()
            first = prefiller.send(asked, rig.peer)
            arriving.append(asked)
            expected[asked.request_id] = [token.token_id for token in alone(reference, replace(asked, mode=Mode.LOCAL))]
            assert first.token_id == expected[asked.request_id][0]
        rig.until(
            lambda: any(a.phase is Phase.RECEIVING for a in rig.loop.attempts.values()) or rig.answers["sent 0"].tokens
        )
        rig.cancel("sent 5")
        for asked in arriving[:5]:
            rig.until(lambda asked=asked: rig.answers[asked.request_id].finish)
            answer = rig.answers[asked.request_id]
            assert answer.ids == expected[asked.request_id][1:]
        rig.finish()
        for each in beside:
            assert rig.answers[each.request_id].tokens == alone(reference, each)
    finally:
        prefiller.close()


def test_what_a_step_takes_is_published(mode: str, make_rig: Callable[..., Rig]):
    rig = make_rig(mode)
    rig.submit(submission("r", prompt(10), replace(GREEDY, max_tokens=40)))
    rig.finish()
    assert rig.stats.decode_step_s > 0
    assert rig.stats.cost_batches > 0
    assert rig.stats.queue_wait_s == 0.0
