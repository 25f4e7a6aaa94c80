"""Lengths, arrivals, prompts: same seed, same load; bad input is named."""

import random
from pathlib import Path

import pytest

from lanewise.bench.workload import Lengths, Prompts, from_trace, read_words, synthetic
from lanewise.errors import ConfigError


def test_lengths() -> None:
    rng = random.Random(0)
    assert Lengths.parse("64").draw(rng) == (64, "64")
    drawn = [Lengths.parse("32-34").draw(rng) for _ in range(200)]
    assert {length for length, _ in drawn} == {32, 33, 34}
    assert {label for _, label in drawn} == {"32-34"}
    mix = Lengths.parse("80%:64, 20%:1500-1536")
    drawn = [mix.draw(rng) for _ in range(2000)]
    share = sum(label == "64" for _, label in drawn) / len(drawn)
    assert 0.76 < share < 0.84
    assert all(length == 64 if label == "64" else 1500 <= length <= 1536 for length, label in drawn)


@pytest.mark.parametrize(
    "text", ["", "a", "0", "9-3", "80:64", "80%:64", "120%:3", "x%:3", "50%:1,50%:b", "50%:1,60%:2"]
)
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Lengths.parse(text)


def test_poisson_arrivals_have_the_rate_and_the_seed() -> None:
    one = Lengths.parse("64")
    asks = synthetic(4000, 20.0, one, one, seed=1)
    arrivals = [ask.arrival_s for ask in asks]
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)  # type: ignore[type-var]
    assert 185 < (arrivals[-1] or 0) < 215
    assert asks == synthetic(4000, 20.0, one, one, seed=1)
    assert asks != synthetic(4000, 20.0, one, one, seed=2)
    assert {ask.arrival_s for ask in synthetic(3, None, one, one, seed=1)} == {None}


def test_prompts_share_no_beginning() -> None:
    prompts = Prompts(7, (100, 2000))
    made = [tuple(prompts.make(i, 64)) for i in range(500)]
    assert len({prompt[:8] for prompt in made}) == 500
    assert all(len(prompt) == 64 and min(prompt) >= 100 and max(prompt) <= 2000 for prompt in made)  # type: ignore[type-var]
    assert made[3] == tuple(Prompts(7, (100, 2000)).make(3, 64))


def test_text_prompts(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one two three")
    prompts = Prompts(7, (1, 2), read_words(str(path)))
    text = prompts.make(0, 6)
    assert isinstance(text, str)
    assert len(text.split()) == 6
    assert set(text.split()[1:]) == {"one", "two", "three"}
    assert len(read_words("")) == 5000
    path.write_text(" ")
    for bad in (str(path), str(tmp_path / "none")):
        with pytest.raises(ConfigError):
            read_words(bad)


def test_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,block_ids_512\n12.0,300,5,x\n10.0,100,,y\n14,7,2,z\n")
    asks = from_trace(path, None, rate_scale=2.0)
    assert [(a.arrival_s, a.prompt_tokens, a.output_tokens, a.label) for a in asks] == [
        (0.0, 100, 1, "<=256"),
        (1.0, 300, 5, ">256"),
        (2.0, 7, 2, "<=256"),
    ]
    assert len(from_trace(path, 2)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "t.csv:1: no column arrival_s"),
        ("arrival_s,prompt_tokens\n1,x\n", "t.csv:2: expected numbers"),
        ("arrival_s,prompt_tokens\n1,2\nnan,2\n", "t.csv:3: expected a finite"),
        ("arrival_s,prompt_tokens\n1\n", "t.csv:2: expected numbers"),
        ("arrival_s,prompt_tokens\n", "no requests"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_trace(path, None)
    with pytest.raises(ConfigError, match="cannot read"):
        from_trace(tmp_path / "none.csv", None)
