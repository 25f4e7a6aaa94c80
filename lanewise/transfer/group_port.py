"""A worker's end of the process that moves payloads through torch.distributed (`nccl_link.py`).

Owns: that process, the memory shared with it, and which pairs and slots are in use. All methods belong to the transfer
thread; nothing here waits. Must not: import torch, or know states of transfers.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from lanewise.errors import ConfigError
from lanewise.transfer import neighbour

log = logging.getLogger("lanewise.transfer")

HEADER_BYTES = 2048
MAX_HEADER_BYTES = HEADER_BYTES - 8  # two sizes stand before it
PACKET_BYTES = 1 << 16
SLOTS = 8
MAX_PAIRS = 64


def check(
    channel: str, *, device: str, encryption: str, encoding: str = "Native", ranks: int = 1, shared: bool = False
) -> None:
    """ConfigError where this worker cannot have that channel; `Auto` always means one it can have. `shared`: other
    processes can reach the memory of its GPU."""
    if channel == "IPC":
        _check_ipc(device, encryption, encoding, ranks, shared)
    if channel == "NCCL" and encryption != "None":
        raise ConfigError(f"channel NCCL: its data cannot be protected; expected encryption None, got {encryption}")


def _check_ipc(device: str, encryption: str, encoding: str, ranks: int, shared: bool) -> None:
    if not neighbour.place():
        raise ConfigError("channel IPC: this system has no process_vm_readv; expected Auto or ZeroMQ")
    if encryption != "None":
        raise ConfigError(f"channel IPC: its data cannot be protected; expected encryption None, got {encryption}")
    if encoding != "Native" or ranks > 1:
        what = f"encoding {encoding}" if encoding != "Native" else f"tensor parallelism of {ranks}"
        raise ConfigError(f"channel IPC: with {what} KV is not sent as it lies in the pool; expected Auto or ZeroMQ")
    if device != "cpu" and not shared:
        raise ConfigError(
            f"channel IPC on {device}: its memory cannot be shared (see the log); expected Auto or ZeroMQ"
        )


def group_host(channel: str, address: str) -> str:
    """The host where the process groups of a worker at this address (with or without a port) meet; empty: none."""
    if channel != "NCCL":
        return ""
    host = address.rpartition("://")[2]
    return (host.rpartition(":")[0] or host).strip("[]")


class GroupPort:
    """`on_event(word, *rest)`: ("up", port) | ("joined", pair) | ("broken", pair, reason) | ("sent", pair, slot) |
    ("chunk", pair, slot, header, bytes) | ("dead", reason)."""

    def __init__(
        self, host: str, slot_bytes: int, *, serve: bool, on_event: Callable[..., None], device: str = "cpu"
    ) -> None:
        """`device`: through whose memory payloads go."""
        self._on_event = on_event
        self._slot_bytes = slot_bytes
        size = SLOTS * slot_bytes
        memory_fd = os.memfd_create("lanewise-kv")
        os.ftruncate(memory_fd, size)
        self._memory = mmap.mmap(memory_fd, size)
        self._view = memoryview(self._memory)
        self._free = list(range(SLOTS))
        self._lent: dict[int, str] = {}  # slot -> the pair that sends it
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = (theirs.fileno(), memory_fd, SLOTS, slot_bytes, host, "serve" if serve else "join", device)
        if device.startswith("cuda"):
            log.warning(
                "channel NCCL on %s has never been run on a GPU by those who wrote it; chunks are verified "
                "where they arrive, and ZeroMQ carries on where it fails",
                device,
            )
        command = [sys.executable, "-m", "lanewise.transfer.nccl_link", *map(str, words)]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(), memory_fd), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        theirs.close()
        os.close(memory_fd)
        ours.setblocking(False)
        self.socket = ours
        self.alive = True

    def on_readable(self) -> None:
        while self.alive:
            try:
                packet = self.socket.recv(PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._died(str(error))
                return
            if not packet:
                self._died("it ended")
                return
            word, *rest = msgspec.msgpack.decode(packet)
            if word in ("sent", "broken"):  # a broken pair reads nothing any more
                self._regain(rest[0], rest[1] if word == "sent" else None)
            self._on_event(word, *rest)

    def _regain(self, pair: str, slot: int | None) -> None:
        for each, holder in list(self._lent.items()):
            if holder == pair and slot in (each, None):
                del self._lent[each]
                self._free.append(each)

    # --- pairs

    def join(self, pair: str, rank: int, host: str = "", port: int = 0) -> None:
        """`pair`: a name never used before, the same on both sides. joined or broken follows."""
        self._order("join", pair, rank, host, port)

    def leave(self, pair: str) -> None:
        """The sending side has no more for it. What was ordered before still goes; the partner hears that it broke."""
        self._order("leave", pair)

    # --- sending

    @property
    def writable(self) -> bool:
        return self.alive and bool(self._free)

    def take(self) -> int | None:
        """A slot to fill and `send`; None while all are on their way."""
        return self._free.pop() if self.writable else None

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        return self._view[slot * self._slot_bytes :][:num_bytes]

    def send(self, pair: str, slot: int, header: bytes, num_bytes: int) -> None:
        """The slot comes back when its bytes have left, or the pair breaks."""
        self._lent[slot] = pair
        self._order("send", pair, slot, header, num_bytes)

    # --- receiving

    def done(self, slot: int) -> None:
        """The chunk in this slot has been dealt with."""
        self._order("free", slot)

    def close(self) -> None:
        self.alive = False
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(5)

    def _order(self, *words: Any) -> None:
        if not self.alive:
            return
        try:
            self.socket.send(msgspec.msgpack.encode(words))
        except OSError as error:  # also a full queue: a process that reads nothing is as good as dead
            self._died(str(error))

    def _died(self, reason: str) -> None:
        if self.alive:
            self.alive = False
            self.process.kill()
            self._on_event("dead", reason)
