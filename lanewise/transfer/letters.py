"""Messages on their way out of one direct connection, in order: what one system call takes, and what has left. Pure.

Must not: touch the socket. Pages are read until a letter has left, so whoever ends a transfer calls `release`: what is
still to be written of it then becomes zeros, which no receiver takes for the chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from lanewise.transfer.faults import Frames
from lanewise.transfer.records import Key

_MAX_PARTS = 512  # of one system call; Linux takes 1024
_ZEROS = memoryview(bytes(1 << 20))


@dataclass(slots=True)
class Letter:
    """Its head, then parts of pages (`lent`) or of the channel's own memory."""

    key: Key
    parts: Frames
    left: int  # bytes
    lent: bool = False
    on_sent: Callable[[], None] = lambda: None


class Letters:
    def __init__(self) -> None:
        self._letters: deque[Letter] = deque()
        self._at = 0  # the part of the first letter that goes next

    def __len__(self) -> int:
        return len(self._letters)

    def add(self, letter: Letter) -> None:
        self._letters.append(letter)

    def next_parts(self) -> Frames:
        """Of the first letter and of those behind it, as many as one system call takes."""
        first = self._letters[0]
        parts = first.parts[self._at : self._at + _MAX_PARTS]
        if self._at + len(parts) == len(first.parts):
            for letter in islice(self._letters, 1, None):
                if len(parts) + len(letter.parts) > _MAX_PARTS:
                    break
                parts += letter.parts
        return parts

    def sent(self, num_bytes: int) -> None:
        """So many bytes of what comes next have left."""
        while self._letters and num_bytes >= self._letters[0].left:
            letter = self._letters.popleft()
            num_bytes -= letter.left
            self._at = 0
            letter.on_sent()
        if num_bytes:
            self._letters[0].left -= num_bytes
            self._skip(self._letters[0].parts, num_bytes)

    def _skip(self, parts: Frames, sent: int) -> None:
        while sent >= len(parts[self._at]):
            sent -= len(parts[self._at])
            self._at += 1
        if sent:
            parts[self._at] = memoryview(parts[self._at])[sent:]

    def release(self, key: Key) -> None:
        """From here on no page of this transfer is read."""
        for index, letter in enumerate(self._letters):
            if letter.lent and letter.key == key:
                first = max(1, self._at if index == 0 else 0)  # the head is no page, and says how long the rest is
                left = sum(map(len, letter.parts[first:]))
                whole, rest = divmod(left, len(_ZEROS))
                letter.parts[first:] = [*[_ZEROS] * whole, *([_ZEROS[:rest]] if rest else [])]
                letter.lent = False

    def clear(self) -> None:
        """None of them will leave; their memory is free."""
        while self._letters:
            self._letters.popleft().on_sent()
        self._at = 0
