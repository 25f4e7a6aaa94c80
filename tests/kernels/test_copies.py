"""The ring of pinned memory: bytes arrive as they were, and no slot is used again before the device is done with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lanewise.kernels.copies import Lane, Ring

CPU = torch.device("cpu")


class Late(Lane):
    """A device that does what it is told as late as it may: when somebody waits for it, or at the end."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: list[Callable[[], object]] = []
        self.done = 0
        self.longest = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.queue.append(lambda: target.copy_(source))
        self.longest = max(self.longest, len(self.queue) - self.done)

    def mark(self) -> int:
        return len(self.queue)

    def wait(self, mark: int | None) -> None:
        for step in self.queue[self.done : mark or 0]:
            step()
        self.done = max(self.done, mark or 0)


@pytest.mark.parametrize("lane", [Lane, Late])
@pytest.mark.parametrize("sizes", [[1], [16], [17], [5, 64, 1, 200, 16], [3] * 40])
def test_bytes_come_down_in_order(lane, sizes):
    dice = np.random.default_rng(sum(sizes))
    parts = [torch.from_numpy(dice.integers(0, 256, size, np.uint8)) for size in sizes]
    ring = Ring(lane(CPU), slots=3, slot_bytes=16)
    for _ in range(2):  # slots are used again
        out = np.zeros(sum(sizes), np.uint8)
        with ring.lane.on():
            ring.down(iter(parts), out)
        assert out.tobytes() == b"".join(part.numpy().tobytes() for part in parts)
    if lane is Late and len(sizes) > 3:
        assert ring.lane.longest == 3, "copies are under way while others are taken"


@pytest.mark.parametrize("lane", [Lane, Late])
@pytest.mark.parametrize("size", [4, 16, 20, 300])
def test_bytes_go_up_in_order(lane, size):
    source = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    ring = Ring(lane(CPU), slots=3, slot_bytes=16)
    given = source.copy()
    with ring.lane.on():
        ring.up(given, target)
        given[:] = 0  # it was borrowed for the call only
        ring.lane.wait(ring.lane.mark())
    assert (target.numpy() == source).all()


def test_parts_are_made_when_their_turn_comes():
    made: list[int] = []
    ring = Ring(Late(CPU), slots=2, slot_bytes=8)

    def parts():
        for index in range(6):
            made.append(index)
            yield torch.full((8,), index, dtype=torch.uint8)
            assert len(made) - ring.lane.done <= 3, "memory of the device for no more than the slots"

    out = np.zeros(48, np.uint8)
    with ring.lane.on():
        ring.down(parts(), out)
    assert out.tolist() == [index for index in range(6) for _ in range(8)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copies_pass_a_stream_that_is_busy():
    device = torch.device("cuda", 0)
    ring = Ring(Lane(device))
    source = torch.arange(1 << 25, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    busy, over = torch.randn(8192, 8192, device=device), torch.cuda.Event()
    for _ in range(200):
        busy = busy @ busy / 8192
    over.record(torch.cuda.current_stream(device))
    out = np.zeros(source.numel() * 4, np.uint8)
    with ring.lane.on():
        ring.down([source], out)
    assert not over.query(), "the copy waited for the model's stream"
    assert (out.view(np.int32) == np.arange(1 << 25)).all()
    back = torch.zeros_like(source)
    with ring.lane.on():
        ring.up(out, back)
    assert torch.equal(back, source)
