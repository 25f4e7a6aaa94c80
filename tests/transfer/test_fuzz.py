"""Mutated messages by the million: each decodes or is refused, in bounded memory.

What decodes goes on into both cores, which must take any message in any state. `LANEWISE_FUZZ_INPUTS` sets the length
of the long run.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from lanewise.transfer import Counters, Limits, Peer, Timers, compat
from lanewise.transfer import messages as m
from lanewise.transfer.fault_shots import parse_shot
from lanewise.transfer.protocol import Emit, Write
from lanewise.transfer.receiver_core import ReceiverCore
from lanewise.transfer.records import Binding, Offered
from lanewise.transfer.sender_core import SenderCore
from tests.transfer.test_messages import END, SAMPLES

LONG = int(os.environ.get("LANEWISE_FUZZ_INPUTS", "10000000"))
CORPUS = [m.encode(sample) for sample in SAMPLES]
SPICE = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"\xc0"]
MAX_GROWTH_BYTES = 128 << 20


def mutate(dice: random.Random) -> bytes:
    """A sample with a few bytes changed, cut, doubled or spiced; mostly with a checksum that is right."""
    frame = bytearray(CORPUS[int(dice.random() * len(CORPUS))])
    for _ in range(1 + int(dice.random() * 3)):
        at = 8 + int(dice.random() * max(1, len(frame) - 8))
        what = dice.random()
        if what < 0.5:
            frame[at : at + 1] = bytes((int(dice.random() * 256),))
        elif what < 0.65:
            del frame[at : at + 1 + int(dice.random() * 8)]
        elif what < 0.8:
            frame[at:at] = frame[8:at]
        elif what < 0.95:
            frame[at:at] = SPICE[int(dice.random() * len(SPICE))]
        else:
            return bytes(frame)  # with a checksum that is wrong
    return m.checksum(frame[8:]) + bytes(frame[8:])


def answer(receiver: ReceiverCore, message: m.AnyMessage, size: int, now: float) -> None:
    """One message to the receiver, and what its driver would do about it."""
    for action in receiver.receive(message, size, now):
        if isinstance(action, Write):
            receiver.wrote(action.key, action.seq, True, now)
        elif isinstance(action, Emit) and isinstance(action.event, Offered):
            receiver.grant(action.event.key, [1], 0, now)
    receiver.acks()


def cores() -> tuple[ReceiverCore, SenderCore]:
    """Each with one transfer in the middle of its data, so that messages meet something."""
    binding = Binding.of(list(range(100)), b"k" * 32)
    key, peer = ("request", 3), Peer("tcp://127.0.0.1:1", "d")
    receiver = ReceiverCore(replace(END, incarnation="d"), Timers(), Limits(), Counters())
    receiver.expect(key, binding, 0.0)
    answer(receiver, compat.hello(END, "d"), 0, 0.0)
    answer(receiver, m.Begin("p", "d", *key, 100, binding.chain, binding.prompt, 1000), 0, 0.0)
    assert receiver.table.live[key].receiving
    sender = SenderCore(END, Timers(), Limits(), Counters())
    sender.begin(key, peer, binding, [1], 0.0)
    sender.receive(peer.kv_address, compat.hello_ack(replace(END, incarnation="d"), "p", "", 1 << 20), 0.0)
    sender.receive(peer.kv_address, m.Grant("d", "p", *key, 0, 1 << 20, 30.0), 0.0)
    sender.ready(key, 100, None)
    while chosen := sender.next_chunk(peer.kv_address):
        sender.sent(*chosen, b"12345678", True, 0.0)
    return receiver, sender


def fuzz(count: int, seed: int) -> int:
    """Number of inputs that decoded; any exception but MalformedMessage is a failure."""
    dice = random.Random(seed)
    decoded = 0
    receiver, sender = cores()
    for number in range(count):
        try:
            message = m.decode(mutate(dice))
        except m.MalformedMessage:
            continue
        decoded += 1
        if decoded % 50 == 0:  # by then most transfers have been talked to death
            receiver, sender = cores()
        now = number * 1e-5
        answer(receiver, message, int(dice.random() * 4096), now)
        sender.receive("tcp://127.0.0.1:1", msgspec.structs.replace(message, src=message.dst, dst=message.src), now)
        receiver.tick(now)
        sender.tick(now)
    return decoded


def long_run(fuzz: Callable[[int, int], object]) -> None:
    """LONG inputs or half an hour; what is kept after the first 100,000 must not grow."""
    fuzz(100_000, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, done, seed = time.monotonic(), 0, 1
    while done < LONG and time.monotonic() - started < 1800:
        fuzz(100_000, seed)
        done, seed = done + 100_000, seed + 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"{done} inputs in {time.monotonic() - started:.0f} s, memory grew by {grown >> 10} KiB")
    assert done >= LONG or time.monotonic() - started >= 1800
    assert grown < MAX_GROWTH_BYTES


def test_twenty_thousand_mutations() -> None:
    assert fuzz(20_000, 1) > 2_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_million_mutations_in_bounded_memory() -> None:
    long_run(fuzz)


def test_fault_items_are_read_or_refused() -> None:
    dice = random.Random(4)
    alphabet = "abk=@#:.ms019_-kill stopdropdelay"
    for _ in range(20_000):
        parse_shot("".join(dice.choices(alphabet, k=dice.randrange(24))))
