"""Both cores against a model that knows who may touch which block, driven by hypothesis.

Blocks are scarce and handed on the moment a transfer has ended, so a write or read after the end hits a block that
belongs to somebody else: the model sees it at once.
"""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lanewise.request import Token
from lanewise.transfer import messages as m
from lanewise.transfer.protocol import Emit, Write
from lanewise.transfer.records import Aborted, Binding, Busy, Committed, Delivered, Drained
from tests.transfer.test_world import KEY, LAYOUT, Net, World

BLOCKS = 6
BLOCK_TOKENS = 64
LENGTHS = (30, 64, 130)


class Blocks:
    """One side's pool: each block is free or owned by one transfer."""

    def __init__(self) -> None:
        self.owner: list[Any] = [None] * BLOCKS

    def take(self, key: Any, tokens: int) -> list[int] | None:
        free = [block for block, owner in enumerate(self.owner) if owner is None]
        wanted = -(-tokens // BLOCK_TOKENS)
        if len(free) < wanted:
            return None
        for block in free[:wanted]:
            self.owner[block] = key
        return free[:wanted]

    def touch(self, key: Any, blocks: list[int], tokens: range) -> None:
        for token in tokens:
            owner = self.owner[blocks[token // BLOCK_TOKENS]]
            assert owner == key, f"{key} touches a block of {owner}"

    def free(self, key: Any) -> None:
        self.owner = [None if owner == key else owner for owner in self.owner]


class Owned(World):
    """The world of test_world.py with blocks that have owners on both sides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lent, self.granted = Blocks(), Blocks()
        self.content: dict[int, dict[tuple[int, ...], Any]] = {block: {} for block in range(BLOCKS)}
        self.tokens: dict[Any, int] = {}
        self.held: dict[Any, list[int]] = {}
        self.waiting: list[Any] = []  # offers that found no room; answered as room comes
        self.lost: set[Any] = set()

    def answer(self, key: Any) -> None:
        self.waiting.append(key)

    def grant_waiting(self) -> None:
        for key in list(self.waiting):
            blocks = self.granted.take(key, self.tokens[key])
            if blocks is not None:
                self.waiting.remove(key)
                self.held[key] = blocks
                self.do_receiver(self.receiver.grant(key, blocks, 0, self.now))

    def do_receiver(self, actions: list[Any], payload: Any = None) -> None:
        for action in actions:
            if isinstance(action, Write) and payload != "garbage":
                self.granted.touch(action.key, action.pages, action.slice.tokens)
                for token, layer, head in itertools.product(*action.slice.ranges):
                    self.content[action.pages[token // BLOCK_TOKENS]][layer, token, head] = payload
            elif isinstance(action, Emit):
                self.ended_at_receiver(action.event)
            super().do_receiver([action], payload)

    def ended_at_receiver(self, event: Any) -> None:
        if isinstance(event, Committed):
            for token in range(self.tokens[event.key]):
                content = self.content[self.held[event.key][token // BLOCK_TOKENS]]
                for layer, head in itertools.product(range(LAYOUT.num_layers), range(LAYOUT.num_kv_heads)):
                    held = content[layer, token, head]
                    assert held == ("kv", event.key), f"{event.key} holds {held}"
        if isinstance(event, Committed | Aborted | Drained):
            if event.key in self.waiting:
                self.waiting.remove(event.key)
            self.granted.free(event.key)  # decoded and gone, or thrown away: at once somebody else's

    def do_sender(self, actions: list[Any]) -> None:
        super().do_sender(actions)
        for action in actions:
            if isinstance(action, Emit) and isinstance(action.event, Delivered | Busy | Aborted):
                self.lent.free(action.event.key)

    def pump(self) -> None:
        while chosen := self.sender.next_chunk("addr"):
            transfer, job = chosen
            self.lent.touch(job.key, job.pages, job.slice.tokens)
            content = ("kv", job.key)
            crc = m.checksum(repr((content, job.slice)).encode())
            self.post("receiver", transfer.chunk(job, crc), content)
            self.do_sender(self.sender.sent(transfer, job, crc, self.dice.random() > 0.1, self.now))


class WhoMayTouchWhich(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**32),
        drop=st.sampled_from([0.0, 0.1, 0.3]),
        double=st.sampled_from([0.0, 0.3]),
        late=st.sampled_from([0.0, 0.3]),
        damage=st.sampled_from([0.0, 0.1]),
        shards=st.sampled_from([1, 2]),
    )
    def start(self, seed: int, drop: float, double: float, late: float, damage: float, shards: int) -> None:
        self.world = Owned(seed, Net(drop, double, late, damage), head_shards=shards)
        self.dice = random.Random(seed)
        self.replays = 0
        self.epochs: dict[str, int] = {}

    @rule(request=st.sampled_from("abcd"), tokens=st.sampled_from(LENGTHS), expected=st.booleans())
    def submit(self, request: str, tokens: int, expected: bool) -> None:
        world = self.world
        key = (request, self.epochs.get(request, 0) + 1)
        blocks = world.lent.take(key, tokens)
        if blocks is None:
            return
        self.epochs[request] = key[1]
        world.tokens[key] = tokens
        world.begun.append(key)
        binding = Binding.of([ord(request)] * tokens, KEY)
        if expected:
            world.do_receiver(world.receiver.expect(key, binding, world.now))
        world.do_sender(world.sender.begin(key, world.peer, binding, blocks, world.now))
        world.sender.ready(key, self.dice.randrange(tokens + 1), range(self.dice.randint(0, LAYOUT.num_layers)))

    @rule()
    def commit(self) -> None:
        for key in self.world.begun[-3:]:
            self.world.do_sender(self.world.sender.commit(key, Token(*key, 0, 5), self.world.now))

    @rule(pick=st.integers(0, 7), at_decode=st.booleans())
    def cancel(self, pick: int, at_decode: bool) -> None:
        world = self.world
        if pick >= len(world.begun):
            return
        key = world.begun[-1 - pick]
        if at_decode:
            world.do_receiver(world.receiver.cancel(key, "by the client", world.now))
        else:
            world.do_sender(world.sender.abort(key, "by the client", world.now))

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.3, 2.5, 9.0, 40.0]))
    def wait(self, seconds: float) -> None:
        until = self.world.now + seconds
        while self.world.now < until:
            self.world.grant_waiting()
            self.world.run(min(until, self.world.now + max(0.01, seconds / 4)))

    @rule()
    def old_messages_come_again(self) -> None:
        """Everything still on the wire arrives twice, in another order."""
        again = list(self.world.wire)
        self.dice.shuffle(again)
        for _, _, to, message, payload in again:
            self.replays += 1
            heapq.heappush(self.world.wire, (self.world.now, 10**6 + self.replays, to, message, payload))

    @invariant()
    def every_begun_transfer_lives_or_has_ended_once(self) -> None:
        if hasattr(self, "world"):
            for key in self.world.begun:
                assert len(self.world.ends(key)) <= 1

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        for _ in range(60):
            world.grant_waiting()
            world.run(world.now + 2.5)
        for key in world.begun:
            if world.receiver.live:
                world.do_receiver(world.receiver.cancel(key, "over", world.now))
            if not world.ends(key):
                world.do_sender(world.sender.abort(key, "over", world.now))
        world.run(world.now + 20)
        assert world.lent.owner == [None] * BLOCKS
        assert world.granted.owner == [None] * BLOCKS
        assert world.receiver.table.credit.outstanding_bytes == 0
        assert [len(world.ends(key)) for key in world.begun] == [1] * len(world.begun)


TestWhoMayTouchWhich = WhoMayTouchWhich.TestCase
TestWhoMayTouchWhich.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
