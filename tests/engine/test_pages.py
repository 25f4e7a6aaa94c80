"""Page bookkeeping: a state machine of sequences that come, grow, share, fork and go."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lanewise.engine.pages import PageTable
from lanewise.engine.sequence import Sequence
from lanewise.policy.blocks import chain_hashes
from lanewise.request import Sampling

KEY = b"k" * 32
SAMPLING = Sampling(max_tokens=10_000)


def ids_of(branch: str, num_tokens: int) -> list[int]:
    """Ids by unit: two branches share ids as long as they share letters."""
    letters = [branch[min(index // 64, len(branch) - 1)] for index in range(num_tokens)]
    prefixes = [branch[: index // 64 + 1] for index in range(num_tokens)]
    return [ord(letter) * 1000 + len(prefix) for letter, prefix in zip(letters, prefixes, strict=True)]


class Pool(RuleBasedStateMachine):
    """20 pages of 32 tokens: ten units, small enough that eviction and refusal happen all the time."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(20, 32)
        self.live: dict[tuple[str, int], Sequence] = {}
        self.cached: set[bytes] = set()
        self.count = 0

    @rule(
        target=sequences, branch=st.text("ab", min_size=1, max_size=6), tokens=st.integers(1, 400), cache=st.booleans()
    )
    def open(self, branch: str, tokens: int, cache: bool) -> tuple[str, int]:
        self.count += 1
        ids = ids_of(branch, tokens)
        seq = Sequence((f"r{self.count}", 1), ids, len(ids), SAMPLING)
        if cache:
            matched = self.table.match(seq.ids, KEY)
            assert self.table.attach(seq, KEY) == matched == seq.num_computed == seq.cached_tokens
            assert matched % 64 == 0
            assert matched < len(ids)
        self.live[seq.key] = seq
        return seq.key

    @rule(key=sequences, tokens=st.integers(1, 200))
    def compute(self, key: tuple[str, int], tokens: int) -> None:
        seq = self.live[key]
        goal = min(len(seq.ids), seq.num_computed + tokens)
        before, free, idle = list(seq.pages), len(self.table.free), self.table.num_idle
        if self.table.ensure(seq, goal):
            assert len(seq.pages) == max(len(before), -(-goal // 32))
            assert list(seq.pages[: len(before)]) == before
            seq.num_computed = max(seq.num_computed, goal)
        else:
            assert -(-goal // 32) - len(before) > free + 2 * idle
            assert (list(seq.pages), len(self.table.free), self.table.num_idle) == (before, free, idle)

    @rule(key=sequences)
    def seal(self, key: tuple[str, int]) -> None:
        seq = self.live[key]
        before = list(seq.pages)
        self.table.seal(seq, KEY)
        assert list(seq.pages) == before  # pages may be lent to a transfer: sealing never swaps them
        assert set(chain_hashes(seq.ids[: seq.num_computed], KEY)) <= set(self.table.snapshot())

    @rule(key=sequences)
    def preempt(self, key: tuple[str, int]) -> None:
        seq = self.live[key]
        self.table.release(seq)
        assert (list(seq.pages), seq.num_computed) == ([], 0)

    @rule(key=consumes(sequences))
    def close(self, key: tuple[str, int]) -> None:
        self.table.release(self.live.pop(key))

    @rule()
    def events(self) -> None:
        added, removed = self.table.take_events()
        assert not set(added) & self.cached
        assert set(removed) <= self.cached
        self.cached = (self.cached | set(added)) - set(removed)
        assert self.cached == set(self.table.snapshot())

    @invariant()
    def sound(self) -> None:
        assert self.table.audit(self.live.values()) == []
        usage = self.table.usage()
        assert usage.used_tokens + usage.cached_tokens + 32 * len(self.table.free) == usage.capacity_tokens == 640
        held = [page for seq in self.live.values() for page in seq.pages]
        assert usage.used_tokens == 32 * len(set(held))

    def teardown(self) -> None:
        for seq in self.live.values():
            self.table.release(seq)
        assert self.table.audit([]) == []
        assert self.table.usage().used_tokens == 0


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def computed(table: PageTable, name: str, branch: str, tokens: int) -> Sequence:
    """A sequence whose ids are all computed and sealed."""
    ids = ids_of(branch, tokens)
    seq = Sequence((name, 1), ids, len(ids), SAMPLING)
    table.attach(seq, KEY)
    assert table.ensure(seq, tokens)
    seq.num_computed = tokens
    table.seal(seq, KEY)
    return seq


def cached_branches(table: PageTable, *branches: str) -> list[int]:
    return [table.match([*ids_of(branch, 64 * len(branch)), 0], KEY) // 64 for branch in branches]


def test_eviction_takes_the_least_recently_used_leaf_first():
    table = PageTable(8, 64)
    for name, branch in (("1", "aaa"), ("2", "bb"), ("3", "c")):
        table.release(computed(table, name, branch, 64 * len(branch)))
    table.release(computed(table, "4", "aaa", 192 + 1))  # uses aaa again: bb is now the oldest
    assert cached_branches(table, "aaa", "bb", "c") == [3, 2, 1]
    seq = Sequence(("5", 1), ids_of("d", 640), 640, SAMPLING)
    expected = [[3, 1, 1], [3, 0, 1], [3, 0, 0], [2, 0, 0], [1, 0, 0], [0, 0, 0]]
    for pages, state in zip(range(3, 9), expected, strict=True):
        assert table.ensure(seq, 64 * pages)
        assert cached_branches(table, "aaa", "bb", "c") == state
        assert table.audit([seq]) == []
    assert not table.ensure(seq, 64 * 9)


def test_a_referenced_unit_is_never_evicted():
    table = PageTable(4, 64)
    holder = computed(table, "1", "aa", 128)
    other = Sequence(("2", 1), ids_of("b", 640), 640, SAMPLING)
    assert not table.ensure(other, 64 * 3)
    assert table.ensure(other, 64 * 2)
    assert cached_branches(table, "aa") == [2]
    table.release(holder)
    assert table.ensure(other, 64 * 4)
    assert cached_branches(table, "aa") == [0]


def test_a_second_copy_takes_over_when_the_first_goes():
    """Two sequences computed the same unit at the same time: no page stays pinned that nobody uses."""
    table = PageTable(4, 64)
    first, second = (Sequence((name, 1), ids_of("ab", 128), 128, SAMPLING) for name in "12")
    for seq in (first, second):
        assert table.ensure(seq, 128)
        seq.num_computed = 128
    table.seal(first, KEY)
    table.seal(second, KEY)
    copies = list(second.pages)
    assert table.usage().used_tokens == 256
    table.release(first)
    assert table.usage().used_tokens == 128
    assert list(second.pages) == copies
    assert table.audit([second]) == []
    table.release(second)
    assert table.usage() == type(table.usage())(0, 128, 256)


def test_the_key_separates_tenants():
    table = PageTable(4, 64)
    table.release(computed(table, "1", "ab", 128))
    ids = [*ids_of("ab", 128), 0]
    assert table.match(ids, KEY) == 128
    assert table.match(ids, b"other") == 0
    assert table.match(ids[:128], KEY) == 64  # the last token must be left to compute
    assert table.match([], KEY) == 0


def test_misuse_is_refused():
    table = PageTable(4, 64)
    first = computed(table, "1", "a", 64)
    with pytest.raises(ValueError, match="already has pages"):
        table.attach(first, KEY)
    with pytest.raises(ValueError, match="two sequences"):
        table.ensure(Sequence(("1", 1), [0], 1, SAMPLING), 1)
    with pytest.raises(ValueError, match="do not divide"):
        PageTable(4, 24)


def test_the_audit_names_leaks():
    table = PageTable(4, 64)
    seq = computed(table, "1", "aa", 100)
    assert "leak: ('1', 1) holds 2 pages and is not live" in table.audit([])
    stolen = table.free.pop()
    assert f"page {stolen} is in 0 places" in table.audit([seq])
    table.free += [stolen, stolen]
    assert f"page {stolen} is in 2 places" in table.audit([seq])
