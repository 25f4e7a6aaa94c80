"""The process beside a worker that moves payloads of chunks through torch.distributed process groups.

    python -m lanewise.transfer.nccl_link COMMAND_FD MEMORY_FD SLOTS SLOT_BYTES HOST serve|join

Owns: the groups, one of two ranks per pair of workers, each with its own prefix in the decode side's store, and one
thread per group. A group that hangs or breaks poisons this process at worst, never the engine.
Must not: know the protocol. What it sends is an opaque header and the bytes of a slot of the shared memory; orders come
from `group_port.py`, and the end of that connection is the end of this process.

The backend is gloo, between CPUs. NCCL takes the same path (one group per pair, header first, then what it announces)
but nothing here has run on a GPU, so it is refused by name in `group_port.check`.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import struct
import sys
import threading
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
_SENDER, _RECEIVER = 0, 1
_SIZES = struct.Struct("<II")  # of header and payload


class Side:
    def __init__(self, orders: socket.socket, memory: mmap.mmap, slots: int, slot_bytes: int, host: str) -> None:
        self.host = host
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
            group = self._meet(pair, rank, host, port)
            self.tell("joined", pair)
            if rank == _SENDER:
                self._send(pair, group)
            else:
                self._receive(pair, group)
        except Exception as error:  # whatever ends a group ends this pair only
            self.tell("broken", pair, (str(error) or type(error).__name__).partition("\n")[0][:500])
        finally:
            self._outgoing.pop(pair, None)

    def _meet(self, pair: str, rank: int, host: str, port: int) -> Any:
        wait = timedelta(seconds=CONNECT_S)
        store = self._store if rank == _RECEIVER else c10d.TCPStore(host, port, is_master=False, timeout=wait)
        options = GLOO._Options()
        options._timeout = wait
        options._threads = 1
        options._devices = [GLOO.create_device(hostname=self.host)]
        return GLOO(c10d.PrefixStore(pair, store), rank, 2, options)

    def _send(self, pair: str, group: Any) -> None:
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
            group.send([head], _RECEIVER, 0).wait(wait)
            if num_bytes:
                group.send([self.slots[slot][:num_bytes]], _RECEIVER, 0).wait(wait)
            if slot >= 0:
                self.tell("sent", pair, slot)

    def _receive(self, pair: str, group: Any) -> None:
        head = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        wait = timedelta(seconds=SILENT_S)
        while True:
            group.recv([head], _SENDER, 0).wait(wait)
            raw = head.numpy().tobytes()
            header_bytes, num_bytes = _SIZES.unpack_from(raw)
            if header_bytes > MAX_HEADER_BYTES or num_bytes > self.slots[0].numel():
                raise ValueError(f"a header of {header_bytes} bytes that announces {num_bytes}")
            if not header_bytes:
                continue
            slot = self.free.get(timeout=SILENT_S)
            try:
                if num_bytes:
                    group.recv([self.slots[slot][:num_bytes]], _SENDER, 0).wait(wait)
            except RuntimeError:
                self.free.put(slot)  # a receive that failed has closed the connection: nothing writes there any more
                raise
            self.tell("chunk", pair, slot, raw[_SIZES.size : _SIZES.size + header_bytes], num_bytes)


def main() -> None:
    command_fd, memory_fd, slots, slot_bytes = (int(word) for word in sys.argv[1:5])
    host, role = sys.argv[5:7]
    torch.set_num_threads(1)
    orders = socket.socket(fileno=command_fd)
    side = Side(orders, mmap.mmap(memory_fd, slots * slot_bytes), slots, slot_bytes, host)
    side.tell("up", side.serve() if role == "serve" else 0)
    side.run()
    os._exit(0)  # threads may wait for partners; nobody is left to be told


if __name__ == "__main__":
    main()
