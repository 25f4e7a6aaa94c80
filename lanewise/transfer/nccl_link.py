"""The process beside a worker that moves payloads of chunks through torch.distributed process groups.

    python -m lanewise.transfer.nccl_link COMMAND_FD MEMORY_FD SLOTS SLOT_BYTES HOST serve|join DEVICE

Owns: the groups, one of two ranks per pair of workers, each with its own prefix in the decode side's store, and one
thread per group. A group that hangs or breaks poisons this process at worst, never the engine.
Must not: know the protocol. What it sends is an opaque header and the bytes of a slot of the shared memory; orders come
from `group_port.py`, and the end of that connection is the end of this process.

Headers go by gloo, always: a receive that waits in NCCL keeps part of a GPU busy. Payloads go by the same group, or,
where DEVICE is a GPU, by one of NCCL's and through memory of that GPU, when the header has said how many bytes both
sides shall post. **NCCL itself has not yet been run**: the tests take this path with gloo in its place (DEVICE
`staged`). Two workers on the same GPU cannot have a group of NCCL's: it breaks, and ZeroMQ carries on.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import struct
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed

from lanewise.transfer.group_port import HEADER_BYTES, MAX_HEADER_BYTES, PACKET_BYTES

c10d: Any = torch.distributed  # its stubs leave out what is used here
GLOO = c10d.ProcessGroupGloo
CONNECT_S = 15.0
KEEP_ALIVE_S = 5.0
SILENT_S = 20.0
"""A partner that sends nothing for so long is gone; it sends an empty header every `KEEP_ALIVE_S`."""
SEND_S = 10.0
END_S = 5.0
"""What is given up has so long to end; then the process does."""
_SENDER, _RECEIVER = 0, 1
_SIZES = struct.Struct("<II")  # of header and payload


class Staged:
    """Payloads through memory of a device, by a group of its own; both sides have agreed on the size before.

    What does not end in time is given up: the group is aborted, and where even that takes too long the process ends."""

    def __init__(self, group: Any, device: torch.device, num_bytes: int, rank: int) -> None:
        self._group = group
        self._partner = 1 - rank
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._gave_up = False
        first = torch.zeros(4, dtype=torch.uint8)  # the communicator is made by the first message
        (self.send if rank == _SENDER else self.receive)(first, CONNECT_S)

    def send(self, payload: torch.Tensor, seconds: float) -> None:
        part = self._memory[: len(payload)]
        part.copy_(payload)
        self._within(seconds, lambda: self._group.send([part], self._partner, 0))

    def receive(self, payload: torch.Tensor, seconds: float) -> None:
        part = self._memory[: len(payload)]
        self._within(seconds, lambda: self._group.recv([part], self._partner, 0))
        payload.copy_(part)

    def _within(self, seconds: float, post: Callable[[], Any]) -> None:
        timer = threading.Timer(seconds, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            post().wait()
            if self._memory.is_cuda:  # NCCL's `wait` is the stream's, not the host's
                torch.cuda.current_stream(self._memory.device).synchronize()
        finally:
            timer.cancel()
        if self._gave_up:
            raise TimeoutError(f"no end within {seconds:g} s")

    def _give_up(self) -> None:
        self._gave_up = True
        last = threading.Timer(END_S, os._exit, (1,))
        last.daemon = True
        last.start()
        self._group.abort()
        last.cancel()


class Plain:
    """Payloads by the group of the headers, between CPUs."""

    def __init__(self, group: Any, rank: int) -> None:
        self._group = group
        self._partner = 1 - rank

    def send(self, payload: torch.Tensor, seconds: float) -> None:
        self._group.send([payload], self._partner, 0).wait(timedelta(seconds=seconds))

    def receive(self, payload: torch.Tensor, seconds: float) -> None:
        self._group.recv([payload], self._partner, 0).wait(timedelta(seconds=seconds))


class Side:
    def __init__(
        self, orders: socket.socket, memory: mmap.mmap, slots: int, slot_bytes: int, host: str, device: str
    ) -> None:
        self.host = host
        self._device = device
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.slots = list(flat[: slots * slot_bytes].view(slots, slot_bytes).unbind(0))
        self.free: queue.Queue[int] = queue.Queue()  # of a receiver
        self._orders = orders
        self._outgoing: dict[str, queue.Queue[tuple[int, bytes, int] | None]] = {}  # None: leave

    def tell(self, *words: Any) -> None:
        self._orders.send(msgspec.msgpack.encode(words))

    def serve(self) -> int:
        """The store all partners meet in; its port."""
        self._store = c10d.TCPStore(self.host, 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def run(self) -> None:
        for slot in range(len(self.slots)):
            self.free.put(slot)
        while packet := self._orders.recv(PACKET_BYTES):
            word, *rest = msgspec.msgpack.decode(packet)
            if word == "join":
                self._outgoing[rest[0]] = queue.Queue()
                threading.Thread(target=self._pair, args=rest, daemon=True).start()
            elif word == "free":
                self.free.put(rest[0])
            elif outgoing := self._outgoing.get(rest[0]):  # else it broke, and its end has been told
                outgoing.put((rest[1], rest[2], rest[3]) if word == "send" else None)

    def _pair(self, pair: str, rank: int, host: str, port: int) -> None:
        try:
            heads, payloads = self._meet(pair, rank, host, port)
            self.tell("joined", pair)
            if rank == _SENDER:
                self._send(pair, heads, payloads)
            else:
                self._receive(pair, heads, payloads)
        except Exception as error:  # whatever ends a group ends this pair only
            self.tell("broken", pair, (str(error) or type(error).__name__).partition("\n")[0][:500])
        finally:
            self._outgoing.pop(pair, None)

    def _meet(self, pair: str, rank: int, host: str, port: int) -> tuple[Any, Plain | Staged]:
        """The group of the headers, and what moves payloads."""
        wait = timedelta(seconds=CONNECT_S)
        store = self._store if rank == _RECEIVER else c10d.TCPStore(host, port, is_master=False, timeout=wait)
        heads = self._gloo(c10d.PrefixStore(pair, store), rank, wait)
        if self._device == "cpu":
            return heads, Plain(heads, rank)
        beside = c10d.PrefixStore(f"{pair}/payloads", store)
        if self._device == "staged":
            group, device = self._gloo(beside, rank, wait), torch.device("cpu")
        else:
            device = torch.device(self._device)
            torch.cuda.set_device(device)  # of this thread
            group = nccl(beside, rank)
        return heads, Staged(group, device, self.slots[0].numel(), rank)

    def _gloo(self, store: Any, rank: int, wait: timedelta) -> Any:
        options = GLOO._Options()
        options._timeout = wait
        options._threads = 1
        options._devices = [GLOO.create_device(hostname=self.host)]
        return GLOO(store, rank, 2, options)

    def _send(self, pair: str, heads: Any, payloads: Plain | Staged) -> None:
        head, outgoing = torch.zeros(HEADER_BYTES, dtype=torch.uint8), self._outgoing[pair]
        wait = timedelta(seconds=SEND_S)
        while True:
            try:
                order = outgoing.get(timeout=KEEP_ALIVE_S)
            except queue.Empty:
                order = -1, b"", 0
            if order is None:
                return
            slot, header, num_bytes = order
            packed = _SIZES.pack(len(header), num_bytes) + header
            head[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
            heads.send([head], _RECEIVER, 0).wait(wait)
            if num_bytes:
                payloads.send(self.slots[slot][:num_bytes], SEND_S)
            if slot >= 0:
                self.tell("sent", pair, slot)

    def _receive(self, pair: str, heads: Any, payloads: Plain | Staged) -> None:
        head = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        wait = timedelta(seconds=SILENT_S)
        while True:
            heads.recv([head], _SENDER, 0).wait(wait)
            raw = head.numpy().tobytes()
            header_bytes, num_bytes = _SIZES.unpack_from(raw)
            if header_bytes > MAX_HEADER_BYTES or num_bytes > self.slots[0].numel():
                raise ValueError(f"a header of {header_bytes} bytes that announces {num_bytes}")
            if not header_bytes:
                continue
            slot = self.free.get(timeout=SILENT_S)
            try:
                if num_bytes:
                    payloads.receive(self.slots[slot][:num_bytes], SILENT_S)
            except (RuntimeError, TimeoutError):
                self.free.put(slot)  # a receive that failed has closed the connection: nothing writes there any more
                raise
            self.tell("chunk", pair, slot, raw[_SIZES.size : _SIZES.size + header_bytes], num_bytes)


def nccl(store: Any, rank: int) -> Any:
    """Of two ranks. Its own guard would end the process after a failure that concerns one pair only; `Staged` has one
    that tries less first."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("NCCL_MAX_NCHANNELS", "2")  # the GPU has a model to compute
    backend = c10d.ProcessGroupNCCL
    options = backend.Options()
    options._timeout = timedelta(seconds=2 * SILENT_S)
    return backend(store, rank, 2, options)


def main() -> None:
    command_fd, memory_fd, slots, slot_bytes = (int(word) for word in sys.argv[1:5])
    host, role, device = sys.argv[5:8]
    torch.set_num_threads(1)
    orders = socket.socket(fileno=command_fd)
    side = Side(orders, mmap.mmap(memory_fd, slots * slot_bytes), slots, slot_bytes, host, device)
    side.tell("up", side.serve() if role == "serve" else 0)
    side.run()
    os._exit(0)  # threads may wait for partners; nobody is left to be told


if __name__ == "__main__":
    main()
