"""Random submits, cancels, KV and prefixes in a small pool: every request says what it says alone, and ends once."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from lanewise.engine.runner import Engine
from lanewise.request import Sampling, Submission
from tests.decode_worker.rig import Rig, alone, submission

ROUNDS = 150
POOL_TOKENS = 320
STOP = frozenset(range(0, 512, 16))


def sampling(dice: random.Random) -> Sampling:
    return Sampling(
        max_tokens=dice.choice([1, 2, 8, 30, 100]),
        temperature=dice.choice([0.0, 0.8, 1.1]),
        top_p=dice.choice([1.0, 0.9]),
        repetition_penalty=dice.choice([1.0, 1.2]),
        frequency_penalty=dice.choice([0.0, 0.4]),
        min_tokens=dice.choice([0, 0, 5]),
        stop_token_ids=dice.choice([frozenset(), STOP]),
        seed=dice.randrange(1 << 64),
        logprobs=dice.choice([None, None, 2]),
    )


class Campaign:
    def __init__(self, seed: int, rig: Rig) -> None:
        self.dice = random.Random(seed)
        self.rig = rig
        self.asked: dict[str, Submission] = {}
        self.prompts = [[self.dice.randrange(1, 512) for _ in range(130)] for _ in range(3)]

    def submit(self) -> None:
        """Prompts share prefixes; some go on where an ended answer stopped, so that what it left is read."""
        dice = self.dice
        ids = list(dice.choice(self.prompts)[: dice.choice([1, 20, 63, 64, 65, 100, 130])])
        done = [name for name, answer in self.rig.answers.items() if answer.ended and answer.tokens]
        if done and dice.random() < 0.4:
            before = dice.choice(done)
            ids = [*self.asked[before].prompt_ids, *self.rig.answers[before].ids, 7]
        ids = ids[:200]
        asked = submission(f"r{len(self.asked)}", ids, sampling(dice))
        self.asked[asked.request_id] = asked
        self.rig.submit(asked)

    def cancel(self) -> None:
        live = [name for name, answer in self.rig.answers.items() if not answer.ended]
        if live:
            self.rig.cancel(self.dice.choice(live))

    def run(self) -> None:
        for _ in range(ROUNDS):
            if self.dice.random() < 0.25:
                self.submit()
            if self.dice.random() < 0.08:
                self.cancel()
            self.rig.round()
        self.rig.finish()

    def check(self, reference: Engine) -> None:
        for name, asked in self.asked.items():
            answer = self.rig.answers[name]
            expected = alone(reference, asked)
            assert answer.tokens == expected[: len(answer.tokens)], f"{name}: {asked.sampling}"
            assert answer.cancelled or len(answer.tokens) == len(expected)
            assert answer.failures == []


def small(make_rig: Callable[..., Rig], mode: str) -> Rig:
    """A small pool whose recent answers were short, so that more are admitted than fit to the end."""
    rig = make_rig(mode, POOL_TOKENS, max_running=5, max_batch_tokens=48)
    for index in range(24):
        rig.submit(submission(f"short {index}", [1 + index], Sampling(2, 0.0)))
    rig.finish()
    rig.answers.clear()
    return rig


@pytest.mark.parametrize("seed", range(6))
def test_everyone_is_served_as_if_alone(seed: int, mode: str, make_rig: Callable[..., Rig], reference: Engine):
    rig = small(make_rig, mode)
    campaign = Campaign(seed, rig)
    campaign.run()
    assert len(campaign.asked) > 20
    # What is cached now is read once more, by prompts that go on after what ended.
    for number, (name, asked) in enumerate(list(campaign.asked.items())):
        ids = [*asked.prompt_ids, *rig.answers[name].ids, 9][:240]
        campaign.asked[f"after {number}"] = submission(f"after {number}", ids, replace(asked.sampling, max_tokens=8))
        rig.submit(campaign.asked[f"after {number}"])
    rig.finish()
    campaign.check(reference)


def test_the_campaign_meets_what_it_is_for(make_rig: Callable[..., Rig]):
    """Preemption, and requests that end while a step computes them: else it shows nothing."""
    rigs = [small(make_rig, "late") for _ in range(6)]
    for seed, rig in enumerate(rigs):
        Campaign(seed, rig).run()
    assert sum(rig.loop._preemptions for rig in rigs) >= 1
    assert sum(len(rig.left) for rig in rigs) >= 20
