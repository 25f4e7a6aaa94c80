"""Both cores in virtual time over a network that loses, doubles, delays and damages: never wrong, always ends."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.policy.blocks import KVLayout
from lanewise.request import Partner, Token
from lanewise.transfer import messages as m
from lanewise.transfer.protocol import Emit, Send, SendProbe, Write
from lanewise.transfer.receiver_core import ReceiverCore
from lanewise.transfer.records import (
    Aborted,
    Binding,
    Busy,
    Committed,
    Counters,
    Delivered,
    Drained,
    Endpoint,
    Limits,
    Offered,
    Timers,
)
from lanewise.transfer.sender_core import SenderCore

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=2, dtype="float32", dtype_bytes=4)
KEY = b"c" * 32
ENDS = (Delivered, Busy, Aborted)


@dataclass
class Net:
    """Chances of each mishap, per message."""

    drop: float = 0.0
    double: float = 0.0
    late: float = 0.0
    damage: float = 0.0
    cut_at: float = float("inf")  # from here on nothing arrives
    cut_until: float = float("inf")


@dataclass
class World:
    seed: int
    net: Net = field(default_factory=Net)
    limits: Limits = field(default_factory=lambda: Limits(chunk_bytes=512, max_chunk_bytes=1024, window_bytes=2048))
    timers: Timers = field(default_factory=Timers)
    grant: Any = None  # (key) -> have_tokens, "busy", "no" or None
    head_shards: int = 1  # of the sender

    def __post_init__(self) -> None:
        self.now = 0.0
        self.dice = random.Random(self.seed)
        self.order = itertools.count()
        self.wire: list[Any] = []
        self.sender_end = Endpoint("prefill", "f", {}, LAYOUT)
        self.counters = Counters(), Counters()
        self.sender = SenderCore(
            self.sender_end, self.timers, self.limits, self.counters[0], head_shards=self.head_shards
        )
        self.peer = Partner("addr", "decode")
        self.new_receiver("decode")
        self.sender_events: list[Any] = []
        self.receiver_events: list[Any] = []
        self.pool: dict[Any, Any] = {}
        self.in_flight_peak = 0
        self.begun: list[Any] = []

    def new_receiver(self, incarnation: str) -> None:
        self.receiver_end = Endpoint(incarnation, "f", {}, LAYOUT)
        self.receiver = ReceiverCore(self.receiver_end, self.timers, self.limits, self.counters[1])

    # --- network

    def post(self, to: str, message: Any, payload: Any = None) -> None:
        net = self.net
        if net.cut_at <= self.now < net.cut_until or self.dice.random() < net.drop:
            return
        for _ in range(2 if self.dice.random() < net.double else 1):
            delay = 0.0005
            if self.dice.random() < net.late:
                delay += self.dice.random() * 3.0
            if self.dice.random() < net.damage:
                if not isinstance(message, m.Chunk):
                    continue  # a damaged header does not decode
                payload = "garbage"
            heapq.heappush(self.wire, (self.now + delay, next(self.order), to, message, payload))

    def arrive(self, to: str, message: Any, payload: Any) -> None:
        decoded = m.decode(m.encode(message))
        assert decoded == message
        if to == "receiver":
            if isinstance(message, m.Probe):
                if message.dst == self.receiver_end.incarnation:
                    self.post("sender", m.ProbeAck(message.dst, message.src, message.nonce, m.checksum(payload)))
                return
            size = 0
            if isinstance(message, m.Chunk):
                size = message.slice.nbytes(LAYOUT)
            self.do_receiver(self.receiver.receive(message, size, self.now), payload)
            self.do_receiver(self.receiver.acks())
        else:
            self.do_sender(self.sender.receive("addr", message, self.now))

    # --- the two drivers

    def do_sender(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.post("receiver", action.message)
            elif isinstance(action, SendProbe):
                self.post("receiver", action.probe, action.payload)
            elif isinstance(action, Emit):
                self.sender_events.append(action.event)

    def do_receiver(self, actions: list[Any], payload: Any = None) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.post("sender", action.message)
            elif isinstance(action, Write):
                good = payload != "garbage"
                if good:
                    for token, layer, head in itertools.product(*action.slice.ranges):
                        self.pool[action.key, layer, token, head] = (payload, layer, token, head)
                self.do_receiver(self.receiver.wrote(action.key, action.seq, good, self.now))
            elif isinstance(action, Emit):
                self.receiver_events.append(action.event)
                if isinstance(action.event, Offered):
                    self.answer(action.event.key)

    def answer(self, key: Any) -> None:
        choice = self.grant(key) if self.grant else 0
        if choice == "busy":
            self.do_receiver(self.receiver.refuse(key, True, "full", 0.5, self.now))
        elif choice == "no":
            self.do_receiver(self.receiver.refuse(key, False, "draining", 0.5, self.now))
        elif choice is not None:
            self.do_receiver(self.receiver.grant(key, ["pages"], choice, self.now))

    def pump(self) -> None:
        while chosen := self.sender.next_chunk("addr"):
            transfer, job = chosen
            content = ("kv", job.key)
            crc = m.checksum(repr((content, job.slice)).encode())
            self.post("receiver", transfer.chunk(job, crc), content)
            self.do_sender(self.sender.sent(transfer, job, crc, True, self.now))

    # --- time

    def run(self, until: float) -> None:
        """Events and timers in order, up to virtual time `until`."""
        for _ in range(200_000):
            self.pump()
            due = min(self.sender.deadline, self.receiver.deadline)
            if self.wire:
                due = min(due, self.wire[0][0])
            if due > until:
                self.now = until
                return
            self.now = max(self.now, due)
            while self.wire and self.wire[0][0] <= self.now:
                self.arrive(*heapq.heappop(self.wire)[2:])
            self.do_sender(self.sender.tick(self.now))
            self.do_receiver(self.receiver.tick(self.now))
        raise AssertionError("time stands still: a deadline that no tick moves")

    def submit(self, key: Any, tokens: int, *, expect: bool = True, commit: bool = True, peer: Any = None) -> None:
        ids = list(range(tokens))
        binding = Binding.of(ids, KEY)
        self.begun.append(key)
        if expect:
            self.do_receiver(self.receiver.expect(key, binding, self.now))
        self.do_sender(self.sender.begin(key, peer or self.peer, binding, ["p"], self.now))
        if commit:
            self.sender.ready(key, tokens, None)
            self.do_sender(self.sender.commit(key, Token(*key, 0, 5), self.now))

    def ends(self, key: Any) -> list[Any]:
        return [e for e in self.sender_events if isinstance(e, ENDS) and e.key == key]

    def check(self, tokens: dict[Any, int]) -> None:
        """What must hold once everything has settled."""
        committed = [e.key for e in self.receiver_events if isinstance(e, Committed)]
        assert len(committed) == len(set(committed))
        for key in self.begun:
            ends = self.ends(key)
            assert len(ends) == 1, (key, ends)
            if isinstance(ends[0], Delivered):
                assert key in committed
        for event in self.receiver_events:
            if isinstance(event, Committed):
                assert event.token.token_id == 5
                received = range(tokens[event.key] - event.received_tokens, tokens[event.key])
                for at in itertools.product(range(LAYOUT.num_layers), received, range(LAYOUT.num_kv_heads)):
                    assert self.pool[event.key, *at] == (("kv", event.key), *at)
        assert self.sender.idle
        assert self.receiver.live == 0
        assert self.receiver.table.credit.outstanding_bytes == 0
        assert not self.receiver.table.draining


def settle(world: World, tokens: dict[Any, int]) -> None:
    """Lets every timer run out; what was expected and never offered is the loop's to cancel."""
    world.run(world.now + 120)
    for key in world.begun:
        if world.ends(key) and world.receiver.live:
            world.do_receiver(world.receiver.cancel(key, "over", world.now))
    world.check(tokens)


def test_clean_network_delivers_everything():
    world = World(1)
    tokens = {(f"r{n}", 1): 1 + n * 7 for n in range(30)}
    for key, count in tokens.items():
        world.submit(key, count)
    world.run(5)
    world.check(tokens)
    assert all(isinstance(world.ends(key)[0], Delivered) for key in tokens)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    drop=st.sampled_from([0.0, 0.05, 0.3]),
    double=st.sampled_from([0.0, 0.3]),
    late=st.sampled_from([0.0, 0.1, 0.5]),
    damage=st.sampled_from([0.0, 0.05, 0.3]),
    have=st.sampled_from([0, 64]),
    shards=st.sampled_from([1, 2]),
)
def test_bad_network_never_gives_wrong_kv_and_every_transfer_ends(seed, drop, double, late, damage, have, shards):
    world = World(seed, Net(drop, double, late, damage), grant=lambda key: have, head_shards=shards)
    tokens = {("a", 1): 64, ("b", 1): 200, ("c", 2): 77}
    for key, count in tokens.items():
        world.submit(key, count)
        world.run(world.now + 0.3)
    settle(world, tokens)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.floats(0, 0.02), length=st.sampled_from([0.5, 3.0, 20.0, 500.0]))
def test_cut_of_the_network_at_any_time(seed, cut, length):
    world = World(seed, Net(cut_at=cut, cut_until=cut + length))
    tokens = {("a", 1): 500, ("b", 1): 65}
    for key, count in tokens.items():
        world.submit(key, count)
    settle(world, tokens)
    if length == 0.5:
        assert [type(world.ends(key)[0]) for key in tokens] == [Delivered, Delivered]
    if length == 500.0:
        assert world.now <= 130


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    at=st.floats(0, 0.02),
    drop=st.sampled_from([0.0, 0.2]),
    who=st.booleans(),
    shards=st.sampled_from([1, 2]),
)
def test_abort_or_cancel_at_any_time(seed, at, drop, who, shards):
    world = World(seed, Net(drop=drop), head_shards=shards)
    key = ("a", 1)
    world.submit(key, 500)
    world.run(at)
    if who:
        world.do_sender(world.sender.abort(key, "changed my mind", world.now))
    else:
        world.do_receiver(world.receiver.cancel(key, "client left", world.now))
        assert [e for e in world.receiver_events if isinstance(e, Drained)] == [Drained(key)]
        written = dict(world.pool)
    settle(world, {key: 500})
    if not who:
        assert world.pool == written, "bytes were written after Drained"


def test_another_incarnation_at_the_same_address():
    world = World(3)
    key = ("a", 1)
    world.submit(key, 500, commit=False)
    world.sender.ready(key, 200, None)
    world.run(1.0)
    world.new_receiver("decode-2")
    world.run(10.0)
    assert world.ends(key) == [Aborted(key, "stale incarnation")]
    again = ("a", 2)
    world.submit(again, 100, peer=Partner("addr", "decode-2"))
    settle(world, {key: 500, again: 100})
    assert isinstance(world.ends(again)[0], Delivered)


@pytest.mark.parametrize("choice", ["busy", "no", None])
def test_refusals_and_silence_of_the_loop(choice):
    world = World(4, grant=lambda key: choice)
    key = ("a", 1)
    world.submit(key, 100)
    world.run(6.0)
    end = world.ends(key)[0]
    expected = {"busy": "", "no": "draining", None: "no GRANT in time"}[choice]
    assert isinstance(end, Busy) if choice == "busy" else end.reason == expected
    settle(world, {key: 100})


def test_begin_before_expect_is_held_then_refused():
    world = World(5)
    for key, wait in ((("a", 1), 3.0), (("b", 1), 5.5)):
        world.submit(key, 100, expect=False)
        world.run(world.now + wait)
        world.do_receiver(world.receiver.expect(key, Binding.of(list(range(100)), KEY), world.now))
        world.run(world.now + 1)
    assert isinstance(world.ends(("a", 1))[0], Delivered)
    late = world.ends(("b", 1))[0]
    assert late.reason in ("no such request here", "no GRANT in time")
    assert isinstance(world.receiver_events[-1], Aborted)  # expect came too late, and the loop is told
    settle(world, {("a", 1): 100, ("b", 1): 100})


def test_higher_epoch_fences_the_lower():
    world = World(6)
    world.submit(("a", 1), 300, commit=False)
    world.sender.ready(("a", 1), 100, None)
    world.run(0.1)
    world.submit(("a", 2), 300)
    world.run(1.0)
    assert isinstance(world.ends(("a", 2))[0], Delivered)
    world.sender.ready(("a", 1), 300, None)
    world.run(2.0)
    assert "superseded by epoch 2" in world.ends(("a", 1))[0].reason
    world.submit(("a", 0), 300, expect=False)
    world.run(3.0)
    assert world.ends(("a", 0))[0].reason == "stale epoch"
    world.do_receiver(world.receiver.expect(("a", 0), Binding.of([1], KEY), world.now))
    assert world.receiver_events[-1] == Aborted(("a", 0), "stale epoch")
    settle(world, {("a", 2): 300})


def test_idle_transfer_keeps_its_lease_and_loses_it_with_the_sender():
    world = World(7)
    key = ("a", 1)
    world.submit(key, 100, commit=False)
    world.run(100.0)
    assert not world.ends(key)
    world.net.cut_at, world.net.cut_until = world.now, world.now + 400
    world.run(115.0)
    assert isinstance(world.ends(key)[0], Aborted)
    assert world.receiver_events[-1] == Aborted(key, "the prefill worker is silent")
    settle(world, {key: 100})


def test_tombstones_are_forgotten_after_their_time():
    world = World(8)
    world.submit(("a", 1), 10)
    world.run(1.0)
    assert len(world.receiver.table.tombstones) == 1
    world.run(125.0)
    assert len(world.receiver.table.tombstones) == 0
    assert not world.receiver.table.tombstones.fences(("a", 0))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), budget=st.sampled_from([1024, 2048, 8192]), shards=st.sampled_from([1, 2]))
def test_bytes_on_their_way_never_exceed_the_credit(seed, budget, shards):
    limits = Limits(chunk_bytes=512, max_chunk_bytes=1024, window_bytes=2048, credit_bytes=budget)
    world = World(seed, Net(drop=0.1, late=0.3), limits, head_shards=shards)
    tokens = {(f"r{n}", 1): 200 for n in range(5)}
    for key, count in tokens.items():
        world.submit(key, count)
    while world.now < 60 and not all(world.ends(key) for key in tokens):
        world.run(world.now + 0.05)
        # one chunk for each transfer may go beyond the budget, see credit.py
        assert 0 <= world.receiver.table.credit.outstanding_bytes <= budget + 5 * 1024
    settle(world, tokens)
    assert "credit" not in str([e for e in world.receiver_events if isinstance(e, Aborted)])
