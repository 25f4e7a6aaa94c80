"""The text of one growing output: whole characters only, and nothing of a stop string.

Owns: incremental detokenising, stop strings across token borders, and what is held back until it is certain.
Must not: know transports or workers. Both parts take amortised constant time per token and per character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lanewise.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6
"""Prompt tokens decoded along with the first output: some decoders treat the start of a text specially."""

_MAX_BROKEN_TOKENS = 8
"""A character has at most four bytes, hence tokens; what still looks incomplete after this is broken for good."""

_MAX_WINDOW_TOKENS = 64
"""Tokens without text, special ones in the main, do not pile up beyond this."""

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns ids into text one by one; an incomplete character waits for its remaining bytes."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The window: ids whose text gives context (already returned), then ids whose text is still to be returned.
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._done_text: str | None = tokenizer.decode(self._window)  # None: not decoded yet
        if self._done_text.endswith(REPLACEMENT):  # the prompt ends inside a character: no context to build on
            self._window, self._done_text = [], ""
        self._num_done = len(self._window)
        self._num_broken = 0  # pushes in a row that ended inside a character
        self._last_text = ""

    def _done(self) -> str:
        """The text of the context. Decoded when it is needed, so that it never holds back what was just found."""
        if self._done_text is None:
            self._done_text = self._tokenizer.decode(self._window[: self._num_done])
        return self._done_text

    def push(self, token_id: int) -> str:
        done = self._done()
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if len(self._window) - self._num_done < _MAX_WINDOW_TOKENS:
            if len(text) <= len(done):
                return ""  # a special token, or a space that a decoder strips at the start
            if text.endswith(REPLACEMENT) and self._num_broken < _MAX_BROKEN_TOKENS:
                self._num_broken += text != self._last_text  # a special token in between adds nothing
                self._last_text = text
                return ""
        self._num_broken, self._last_text = 0, ""
        self._window = self._window[self._num_done :]
        self._num_done = len(self._window)
        self._done_text = None
        return text[len(done) :]

    def flush(self) -> str:
        """Whole characters that came in one token with the beginning of a character that nothing completes."""
        if len(self._window) == self._num_done:
            return ""
        return self._tokenizer.decode(self._window)[len(self._done()) :].rstrip(REPLACEMENT)


class _Matcher:
    """Knuth–Morris–Pratt for one stop string: `state` characters of it end the text seen so far."""

    __slots__ = ("failure", "pattern", "state")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0
        self.failure = [0] * len(pattern)
        length = 0
        for i in range(1, len(pattern)):
            while length and pattern[i] != pattern[length]:
                length = self.failure[length - 1]
            length += pattern[i] == pattern[length]
            self.failure[i] = length

    def step(self, char: str) -> bool:
        """Whether the pattern ends with this character. A full match leaves the state at its longest border."""
        state, pattern = self.state, self.pattern
        while state and char != pattern[state]:
            state = self.failure[state - 1]
        state += char == pattern[state]
        matched = state == len(pattern)
        self.state = self.failure[state - 1] if matched else state
        return matched


class StopStrings:
    """Finds the first stop string to be completed, and holds back what could still become one.

    The result depends on the text alone, never on how it was cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first: of two that end at the same character, the one that began earlier wins.
        self._matchers = [_Matcher(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Returns (text that is certain, the stop string that matched or None). `armed=False` ignores matches."""
        if not self._matchers:
            return text, None
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            matched = None
            for matcher in self._matchers:
                if matcher.step(char) and matched is None:
                    matched = matcher.pattern
            if matched is not None and armed:
                self._held = ""
                return pending[: position - len(matched)], matched
        hold = max(matcher.state for matcher in self._matchers)
        cut = len(pending) - hold
        self._held = pending[cut:]
        return pending[:cut], None

    def flush(self) -> str:
        """The text held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    stop: str | None  # the stop string that ended the output; nothing may be pushed after it


class TextStream:
    """Detokeniser and stop strings of one output, plus the rule for `min_tokens`."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), stops: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self.num_tokens = 0

    def push(self, token_id: int) -> TextDelta:
        self.num_tokens += 1
        # A stop string may end an output only where an end-of-sequence token could: after min_tokens others.
        text, stop = self._stops.push(self._detokenizer.push(token_id), self.num_tokens > self._min_tokens)
        return TextDelta(text, stop)

    def count(self) -> None:
        """A token that has no text: the id that ended the output."""
        self.num_tokens += 1

    def flush(self) -> str:
        """What was held back. An incomplete character at the very end is dropped: it will never be whole."""
        text, stop = self._stops.push(self._detokenizer.flush())
        return text if stop is not None else text + self._stops.flush()
