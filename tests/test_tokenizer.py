"""Text and tokens: equality with the reference library, whole characters, stop strings across any token borders."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import lanewise
from lanewise.errors import LanewiseError
from lanewise.text import REPLACEMENT, Detokenizer, StopStrings, TextStream
from lanewise.tokenizer import Tokenizer

FABLE = Path(lanewise.__file__).parent / "models" / "fable"


def byte_level() -> bytes:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox é 你好 🙂"] * 8, trainer)
    backend.add_tokens([AddedToken("<think>"), AddedToken("ü ber")])
    backend.enable_truncation(8)
    return backend.to_str().encode()


def sentencepiece_like() -> bytes:
    """Byte fallback and a stripped first space, as Llama 2 has it."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁Paris", "▁is", "a", "b", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend.to_str().encode()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level(), eos_ids=[0])


@pytest.fixture(scope="module")
def fable() -> Tokenizer:
    config = json.loads((FABLE / "tokenizer_config.json").read_text())
    return Tokenizer(
        (FABLE / "tokenizer.json").read_bytes(),
        chat_template=config["chat_template"],
        special_tokens={"eos_token": config["eos_token"]},
    )


BYTE_LEVEL = Tokenizer(byte_level(), eos_ids=[0])
IDS = st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=60)


class TestTokenizer:
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
    def test_a_text_survives_the_round_trip(self, text: str) -> None:
        assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text), skip_special_tokens=False) == text

    def test_settings_of_a_training_run_do_not_cut_prompts(self, tokenizer: Tokenizer) -> None:
        assert len(tokenizer.encode("the quick brown fox " * 10)) > 8

    def test_a_long_text_in_a_thread_gives_the_same_ids(self, fable: Tokenizer) -> None:
        text = "Once upon a time é " * 300
        assert fable.encode_long(text) == fable.encode(text)

    def test_bytes_of_all_tokens_make_the_text(self, fable: Tokenizer) -> None:
        text = "Grüße, 世界 🙂 <|im_end|> end"
        ids = fable.encode(text)
        assert b"".join(map(fable.token_bytes, ids)).decode() == text

    def test_token_text_of_kinds(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.token_text(0) == "<|end|>"
        assert tokenizer.token_bytes(10_000) == b""  # vocabularies are padded beyond the tokenizer's
        llama = Tokenizer(sentencepiece_like())
        assert llama.token_bytes(1 + 0xE2) == b"\xe2"
        assert llama.token_text(258) == " Paris"

    def test_chat_equals_the_reference(self, fable: Tokenizer) -> None:
        transformers = pytest.importorskip("transformers")
        reference = transformers.AutoTokenizer.from_pretrained(FABLE)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wer bist <b>du</b>?"}]
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert fable.encode_chat(messages) == expected
        assert fable.encode("a prompt") == reference("a prompt")["input_ids"]


class TestTemplate:
    def render(self, template: str, **special: str) -> str:
        made = Tokenizer(byte_level(), chat_template=template, special_tokens=special)
        return made.render_chat([{"role": "user", "content": "<x> é"}])

    def test_environment_is_the_documented_one(self) -> None:
        loop = "{% for m in messages %}\n    {% generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}"
        template = "{{ bos_token }}" + loop
        # trim_blocks and lstrip_blocks: the line break after a block and the spaces before one are gone.
        assert self.render(template, bos_token="<s>") == '<s>{"role": "user", "content": "<x> é"}'
        assert self.render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
        assert (
            self.render("{% set ns = namespace(i=1) %}{% for m in messages %}{% set ns.i = 5 %}{% endfor %}{{ ns.i }}")
            == "5"
        )

    @pytest.mark.parametrize(
        "template",
        [
            "{{ raise_exception('roles must alternate') }}",
            "{{ messages.append(1) }}",
            "{{ ''.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
            "{{ undefined_thing.attribute }}",
            "{% set ns = namespace() %}{% set ns._x = 1 %}",
        ],
    )
    def test_refusals_are_errors_of_the_request(self, template: str) -> None:
        with pytest.raises(LanewiseError, match="chat template refuses"):
            self.render(template)

    def test_no_template(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(LanewiseError, match="no chat template"):
            tokenizer.encode_chat([{"role": "user", "content": "x"}])


class TestDetokenizer:
    @given(IDS)
    def test_pieces_make_the_whole_text_without_broken_characters(self, ids: list[int]) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL)
        got = "".join(detokenizer.push(i) for i in ids)
        whole = BYTE_LEVEL.decode(ids)
        assert whole.startswith(got)
        # What is missing in the end is an incomplete character, and nothing else.
        assert (got + detokenizer.flush()).rstrip(REPLACEMENT) == whole.rstrip(REPLACEMENT)

    @given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=20))
    def test_valid_text_never_shows_a_replacement(self, text: str) -> None:
        text = text.replace(REPLACEMENT, "")
        detokenizer = Detokenizer(BYTE_LEVEL)
        pieces = [detokenizer.push(i) for i in BYTE_LEVEL.encode(text)]
        assert "".join(pieces) == text
        assert not any(REPLACEMENT in piece for piece in pieces)

    def test_endless_invalid_bytes_do_not_pile_up(self) -> None:
        invalid = next(i for i in range(300) if BYTE_LEVEL.token_bytes(i) == b"\xff")
        detokenizer = Detokenizer(BYTE_LEVEL)
        for _ in range(100):
            detokenizer.push(invalid)
            assert len(detokenizer._window) <= 64

    def test_endless_special_tokens_do_not_pile_up(self) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL)
        for _ in range(500):
            assert detokenizer.push(0) == ""
            assert len(detokenizer._window) <= 128

    def test_first_space_is_kept_after_a_prompt(self) -> None:
        llama = Tokenizer(sentencepiece_like())
        assert Detokenizer(llama, prompt_ids=[260, 259]).push(258) == " Paris"
        assert Detokenizer(llama).push(258) == "Paris"  # a text of its own starts without

    def test_prompt_that_ends_inside_a_character(self) -> None:
        ids = BYTE_LEVEL.encode("ж")
        assert len(ids) == 2
        assert Detokenizer(BYTE_LEVEL, ids[:1]).push(BYTE_LEVEL.encode("a")[0]) == "a"


ALPHABET = "abé"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)


def expected_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the first character at which some stop string is complete; the longest of those."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


class TestStopStrings:
    @given(STOPS, st.lists(st.text(ALPHABET, max_size=4), max_size=20))
    @settings(max_examples=300)
    def test_any_cut_into_tokens_gives_the_same(self, stops: list[str], pieces: list[str]) -> None:
        filter_ = StopStrings(stops)
        out, matched = "", None
        for piece in pieces:
            text, matched = filter_.push(piece)
            out += text
            if matched is not None:
                break
        if matched is None:
            out += filter_.flush()
        assert (out, matched) == expected_cut("".join(pieces), stops)

    @given(STOPS, st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=20))
    def test_holds_back_exactly_what_could_become_a_stop(self, stops: list[str], pieces: list[str]) -> None:
        filter_ = StopStrings(stops)
        seen = out = ""
        for piece in pieces:
            text, matched = filter_.push(piece)
            if matched is not None:
                return
            seen, out = seen + piece, out + text
            longest = max((k for s in stops for k in range(len(s)) if seen.endswith(s[:k])), default=0)
            assert out == seen[: len(seen) - longest]

    def test_disarmed_matches_are_text(self) -> None:
        filter_ = StopStrings(["ab"])
        assert filter_.push("abab", armed=False) == ("abab", None)
        assert filter_.push("xab") == ("x", "ab")

    def test_a_match_may_begin_before_it_is_armed(self) -> None:
        filter_ = StopStrings(["ab"])
        assert filter_.push("xa", armed=False) == ("x", None)
        assert filter_.push("b") == ("", "ab")


class TestTextStream:
    def test_stop_across_token_borders_and_min_tokens(self, fable: Tokenizer) -> None:
        ids = fable.encode("one two three four five two six")
        texts = [fable.token_text(i) for i in ids]
        first = next(n for n in range(len(texts)) if "two" in "".join(texts[: n + 1])) + 1

        def run(min_tokens: int) -> tuple[str, str | None, int]:
            stream = TextStream(fable, stops=["two"], min_tokens=min_tokens)
            out = ""
            for token_id in ids:
                delta = stream.push(token_id)
                out += delta.text
                if delta.stop is not None:
                    return out, delta.stop, stream.num_tokens
            return out + stream.flush(), None, stream.num_tokens

        assert run(0) == ("one ", "two", first)
        text, stop, tokens = run(first)
        assert (text, stop) == ("one two three four five ", "two")
        assert tokens > first

    def test_cost_per_token_does_not_grow(self, fable: Tokenizer) -> None:
        stream = TextStream(fable, stops=["never"])
        for token_id in fable.encode("word " * 2000):
            stream.push(token_id)
            assert len(stream._detokenizer._window) <= 20
