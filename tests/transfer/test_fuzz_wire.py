"""What else decodes bytes from the network, beside messages: each takes any bytes, or refuses them by its own error.

`LANEWISE_FUZZ_INPUTS` sets the length of the long run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import zmq

from lanewise.policy.blocks import WIRE_BITS
from lanewise.transfer import direct, neighbour
from lanewise.transfer import messages as m
from lanewise.transfer.bundles import MOST, apart
from lanewise.transfer.encoding import Encoding, wire_layout
from lanewise.transfer.gate import DATA_DOMAIN, Gate
from lanewise.transfer.keys import Security
from lanewise.transfer.records import Counters
from tests.transfer.test_fuzz import CORPUS, long_run, mutate
from tests.transfer.test_messages import END

MOST_BYTES = 4 << 20
TOKENS, LAYERS = 70, 1  # more than a unit of an encoding, and no whole number of them
LAYOUTS = [replace(wire_layout(END.layout, encoding), num_layers=LAYERS) for encoding in WIRE_BITS]

Decoder = Callable[[random.Random], bool]
"""One input; whether it was taken."""


def damaged(dice: random.Random, sample: bytes) -> bytes:
    """A few bytes changed; one in four is cut or longer."""
    data = bytearray(sample)
    for _ in range(1 + int(dice.random() * 4)):
        data[int(dice.random() * len(data))] = int(dice.random() * 256)
    if dice.random() < 0.25:
        del data[int(dice.random() * len(data)) :]
        data += dice.randbytes(int(dice.random() * 40))
    return bytes(data)


def greeting(dice: random.Random) -> bool:
    sample = direct.greeting(direct.Greeting("prefill-0", b"t" * direct.TOKEN_BYTES, 4711, 1 << 40))
    data = damaged(dice, sample)[: len(sample)].ljust(len(sample), b"\0")  # so many are waited for
    try:
        found = direct.read_greeting(data)
    except direct.NotASender:
        return False
    assert len(found.token) == direct.TOKEN_BYTES
    return True


def lengths(dice: random.Random) -> bool:
    data = dice.randbytes(direct.LENGTHS_BYTES) if dice.random() < 0.5 else damaged(dice, direct.lengths(300, 0))
    try:
        header, payload = direct.read_lengths(
            data[: direct.LENGTHS_BYTES].ljust(direct.LENGTHS_BYTES, b"\0"), MOST_BYTES
        )
    except direct.NotASender:
        return False
    assert 0 < header <= direct.MAX_HEADER_BYTES
    assert payload <= MOST_BYTES
    return True


def references(dice: random.Random) -> bool:
    parts = np.array([(1 << 46, 4096), (1 << 46 | 1 << 20, 100)] * (1 + int(dice.random() * 4)), np.uint64)
    try:
        areas, total = neighbour.unpack(damaged(dice, neighbour.packed(parts)), MOST_BYTES)
    except neighbour.NotRuns:
        return False
    assert 0 < total <= MOST_BYTES
    assert total == sum(areas[:, 1].tolist())
    return True


def bundle(dice: random.Random) -> bool:
    frames = [mutate(dice) if dice.random() < 0.3 else dice.choice(CORPUS) for _ in range(int(dice.random() * MOST))]
    try:
        return len(list(apart([zmq.Frame(frame) for frame in frames]))) > 0
    except m.MalformedMessage:
        return False


def encoded(dice: random.Random) -> bool:
    """The payload of a chunk is of the size that its header says, or it is not decoded."""
    layout = LAYOUTS[int(dice.random() * len(LAYOUTS))]
    data = dice.randbytes(layout.wire_bytes(TOKENS, LAYERS))
    encoding = Encoding.of(layout)
    assert encoding is not None
    return len(encoding.decode(memoryview(data), TOKENS, LAYERS)) == layout.slice_bytes(TOKENS, LAYERS)


def credentials(gate: Gate) -> Decoder:
    """Name and token of a data connection; libzmq has taken the handshake apart."""

    def decode(dice: random.Random) -> bool:
        name = b"prefill-0" if dice.random() < 0.5 else dice.randbytes(int(dice.random() * 12))
        token = gate.token("prefill-0") if dice.random() < 0.5 else damaged(dice, gate.token("prefill-0"))
        good = gate._admits(DATA_DOMAIN, b"PLAIN", [name, token])
        assert good == (name == b"prefill-0" and token == gate.token("prefill-0"))
        return good

    return decode


def decoders() -> list[tuple[str, int, Decoder]]:
    """With how often each has its turn: the cheap ones more often."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gate = Gate(context, Security(), 8, Counters())
    context.destroy(linger=0)
    found = [(greeting, 20), (lengths, 20), (references, 20), (bundle, 4), (encoded, 1), (credentials(gate), 20)]
    return [(decoder.__qualname__.partition(".")[0], often, decoder) for decoder, often in found]


def fuzz(count: int, seed: int) -> dict[str, int]:
    """How many of `count` inputs each decoder has taken; any exception but its own is a failure."""
    dice = random.Random(seed)
    known = decoders()
    taken = dict.fromkeys((name for name, _, _ in known), 0)
    for name, _, decoder in dice.choices(known, [often for _, often, _ in known], k=count):
        taken[name] += decoder(dice)
    return taken


def test_twenty_thousand_inputs() -> None:
    taken = fuzz(20_000, 1)
    assert min(taken.values()) > 20, f"a decoder that takes nothing is not tested: {taken}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_million_inputs_in_bounded_memory() -> None:
    long_run(fuzz)
