"""Letters leave whole and in order, however few bytes each system call takes, and show no page of who has ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lanewise.transfer.letters import Letter, Letters

PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


def letter(index: int, pieces: list[bytes], left: list[int]) -> Letter:
    """With a head of four bytes; its parts are pages."""
    parts: list[bytes | memoryview] = [bytes([index] * 4), *map(memoryview, pieces)]
    return Letter((f"r{index}", 1), parts, sum(map(len, parts)), True, lambda: left.append(index))


@given(st.lists(PIECES, min_size=1, max_size=5), st.lists(st.integers(1, 90), min_size=1), st.data())
def test_bytes_leave_in_order_and_what_was_released_as_zeros(
    contents: list[list[bytes]], takes: list[int], data: st.DataObject
) -> None:
    letters, ended, out = Letters(), [], b""
    for index, pieces in enumerate(contents, 1):
        letters.add(letter(index, pieces, ended))
    released, at = data.draw(st.integers(1, len(contents))), data.draw(st.integers(0, 3))
    heard: bytes | None = None
    for turn in range(10_000):
        if not letters:
            break
        if turn == at:
            letters.release((f"r{released}", 1))
            heard = out
        taken = b"".join(letters.next_parts())[: takes[turn % len(takes)]]
        letters.sent(len(taken))
        out += taken
    assert ended == list(range(1, len(contents) + 1))
    expected = b""
    for index, pieces in enumerate(contents, 1):
        start = len(expected) + 4
        expected += bytes([index] * 4) + b"".join(pieces)
        if index == released and heard is not None:
            gone = max(start, len(heard))
            expected = expected[:gone] + bytes(max(0, len(expected) - gone))
    assert out == expected


def test_many_letters_leave_together() -> None:
    letters = Letters()
    for index in range(1, 41):
        letters.add(letter(index, [b"x"], []))
    assert len(letters.next_parts()) == 80
    letters.clear()
    assert not letters
