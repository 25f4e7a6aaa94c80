"""The receiving ends of direct connections: chunks go from the network straight into pages. See direct.py for the wire.

Owns: who may open one, reading them without waiting, and where the bytes of each chunk go while they come: into pages
that lie in this process's memory, else into memory of its own and from there to the pool. What a message only refers
to is read from the sender's memory (neighbour.py).
Must not: decide anything about a transfer (`receiver_core.py` does), or write into pages of one that is ending: `tick`
lets go of those, and a chunk that came only in part counts as damaged.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
from typing import Protocol

import zmq

from lanewise.errors import ConfigError
from lanewise.policy.blocks import KVLayout
from lanewise.transfer import direct, ipc_link
from lanewise.transfer import messages as m
from lanewise.transfer.faults import Faults
from lanewise.transfer.inlet import Fetch, Inlet, Sink
from lanewise.transfer.ipc_link import DeviceSink, Mapped, Openings
from lanewise.transfer.neighbour import Areas, Neighbour, NotRuns, Reading, unpack
from lanewise.transfer.protocol import Action, Send, Write
from lanewise.transfer.receiver_core import ReceiverCore
from lanewise.transfer.records import Counters, Limits, PageStore
from lanewise.transfer.zmq_link import log

_IN = int(zmq.POLLIN)
_MAX_PER_SENDER = 4
_SCRATCH_BYTES = 256 << 10


class Host(direct.Watcher, Protocol):
    """What the receiving thread does for its inlets."""

    core: ReceiverCore
    counters: Counters
    limits: Limits
    faults: Faults

    def perform(self, actions: list[Action]) -> None: ...

    def write(self, write: Write, payload: memoryview, now: float) -> None:
        """Checks a chunk that is here as a whole, puts it into pages, and says so."""


class Inlets:
    def __init__(self, listen: str, store: PageStore, layout: KVLayout, host: Host) -> None:
        """Listens on the host of `listen`, at any free port if it names 0. Raises ConfigError."""
        self.host = host
        self.max_chunk_bytes = host.limits.max_chunk_bytes
        self.scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._device = ipc_link.checked(store.device_memory)
        self._openings = Openings(self._device) if self._device else None
        self.place = ipc_link.place(self._device)
        self._store = store
        self._layout = layout
        self._secret = secrets.token_bytes(direct.TOKEN_BYTES)
        self._all: list[Inlet] = []
        place = direct.place(listen, int(listen.rpartition(":")[2]))
        if place is None:
            raise ConfigError(f"cannot listen on {listen!r}: not a numeric address")
        family, *address = place
        try:
            self._listener = socket.create_server(tuple(address), family=family)
        except OSError as error:
            raise ConfigError(f"cannot listen on {listen!r}: {error}") from None
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        host.watch(self._listener, _IN, self._accept)

    def token(self, incarnation: str) -> bytes:
        """What a greeted sender shows when it connects."""
        return hmac.digest(self._secret, incarnation.encode(), "sha256")

    def tick(self, now: float) -> None:
        """Lets go of pages whose transfer is ending, and of connections that do not say whose they are."""
        for inlet in list(self._all):
            sink = inlet.sink
            if sink and sink.write and self.host.core.draining(sink.write.key):
                self._lost(sink, now)
            if not inlet.author and now >= inlet.silent_until:
                self.drop(inlet, now)

    def close(self, now: float) -> None:
        if self._listener.fileno() >= 0:
            self.host.unwatch(self._listener)
            self._listener.close()
        for inlet in list(self._all):
            self.drop(inlet, now)

    # --- connections

    def _accept(self, now: float) -> None:
        with contextlib.suppress(OSError):  # nobody there any more
            while True:
                sock, _ = self._listener.accept()
                direct.prepare(sock)
                inlet = Inlet(sock, self, now)
                self._all.append(inlet)
                self.host.watch(sock, _IN, inlet.on_ready)
                strangers = [each for each in self._all if not each.author]
                if len(strangers) > self.host.limits.max_handshakes:
                    self.host.counters.refused_connections += 1
                    self.drop(strangers[0], now)

    def admit(self, inlet: Inlet, greeting: direct.Greeting, now: float) -> str:
        """The author of all that comes by this connection; NotASender where it has no token."""
        incarnation = greeting.incarnation
        if not incarnation or not hmac.compare_digest(greeting.token, self.token(incarnation)):
            self.host.counters.refused_connections += 1
            raise direct.NotASender("no token")
        older = [each for each in self._all if each.author == incarnation]
        if len(older) >= _MAX_PER_SENDER:  # of connections that are gone, unknown to us
            self.drop(older[0], now)
        try:
            inlet.neighbour = Neighbour.known_by(greeting.pid, greeting.address, greeting.token)
            inlet.mapped = self._mapped(inlet.neighbour, greeting.address + len(greeting.token))
            reads = inlet.neighbour and (inlet.mapped or not self._device)
            inlet.sock.send(direct.WELCOME_READS if reads else direct.WELCOME)
        except OSError:
            raise direct.NotASender("gone") from None
        return incarnation

    def drop(self, inlet: Inlet, now: float, *, malformed: bool = False) -> None:
        self.host.counters.malformed += malformed
        self._all.remove(inlet)
        self.host.unwatch(inlet.sock)
        inlet.sock.close()
        if inlet.sink:
            self._lost(inlet.sink, now)
        if inlet.mapped:
            inlet.mapped.close()

    def _mapped(self, found: Neighbour | None, address: int) -> Mapped | None:
        """The GPU's memory that a neighbour shows at this address of its process; None where there is none to read."""
        if found is None or self._openings is None:
            return None
        shown = bytearray(ipc_link.CARD_BYTES)
        try:
            found.read(ipc_link.area(address, len(shown)), [memoryview(shown)], len(shown))
            return Mapped(self._openings, bytes(shown))
        except OSError as error:
            log.warning("the GPU memory of process %d cannot be read here: %s", found.pid, error)
            return None

    # --- chunks

    def open(self, inlet: Inlet, header: memoryview, num_bytes: int, now: float) -> Sink:
        """Where the payload announced by this header goes, or what it refers to."""
        host = self.host
        fetch: Fetch | None = None
        source: Areas | None = None  # in this GPU's reach
        try:
            message = m.decode(header)
            if not isinstance(message, m.Chunk | m.Commit | m.Probe) or message.src != inlet.author:
                raise m.MalformedMessage("nothing that comes by this connection")
            if not isinstance(message, m.Commit) and message.runs:
                num_bytes, fetch, source = self._referred(inlet, message, num_bytes)
        except (m.MalformedMessage, NotRuns):
            host.counters.malformed += 1
            return Sink(num_bytes)
        if isinstance(message, m.Probe):
            if source is not None and self._device:
                block = ipc_link.area(self._device.block[0], num_bytes)
                return DeviceSink(self._device, source, block, probe=message)
            return Sink(num_bytes, probe=message, pages=[self._staging(inlet, num_bytes)], fetch=fetch)
        actions = host.core.receive(message, num_bytes, now)
        host.perform([action for action in actions if not isinstance(action, Write)])
        write = next((action for action in actions if isinstance(action, Write)), None)
        nothing = Sink(num_bytes if fetch is None and source is None else 0)
        if write is None:
            return nothing
        try:
            if source is not None and self._device:
                host.faults.point("chunk_writing")
                places = self._device.places(write.pages, *write.slice.ranges)
                if places is None:
                    raise ValueError("a part of the heads cannot be copied from one GPU to another")
                return DeviceSink(self._device, source, places, write=write)
            pages = self._pages(write, num_bytes)
        except Exception as error:  # of the pool, whatever it is: this transfer ends, the others go on
            host.perform(host.core.write_failed(write.key, write.seq, f"writing pages: {error}", now))
            return nothing
        if pages is None:
            return Sink(num_bytes, write, staged=self._staging(inlet, num_bytes), fetch=fetch)
        host.faults.point("chunk_writing")
        return Sink(num_bytes, write, pages=pages, fetch=fetch)

    def _referred(
        self, inlet: Inlet, message: m.Chunk | m.Probe, num_bytes: int
    ) -> tuple[int, Fetch | None, Areas | None]:
        """How many bytes a message's references name, and how to get them, or where they are here; raises NotRuns."""
        if num_bytes or inlet.neighbour is None or (self._device and not inlet.mapped):
            raise NotRuns("references with a payload, or to memory that cannot be read")
        areas, total = unpack(message.runs, self.max_chunk_bytes)
        if inlet.mapped is None or self._device is None:
            return total, Reading(inlet.neighbour, areas, total).fill, None
        if isinstance(message, m.Probe) and total > self._device.block[1]:
            raise NotRuns(f"a test block of {total} bytes")
        return total, None, inlet.mapped.here(areas)

    def _staging(self, inlet: Inlet, num_bytes: int) -> memoryview:
        if len(inlet.staging) < num_bytes:
            inlet.staging = bytearray(num_bytes)
        return memoryview(inlet.staging)[:num_bytes]

    def _pages(self, write: Write, num_bytes: int) -> list[memoryview] | None:
        """Where the chunk's bytes belong; None where they do not go there as they are, or in too many pieces."""
        if num_bytes != write.slice.nbytes(self._layout) or self._layout.encoding != "Native" or write.words:
            return None
        pages = self._store.views(write.pages, *write.slice.ranges)
        return pages if pages and num_bytes >= len(pages) * self.host.limits.least_piece_bytes else None

    def finish(self, sink: Sink, now: float) -> None:
        """All bytes of a message are here."""
        write, probe = sink.write, sink.probe
        if probe is not None and not sink.failed and probe.dst == self.host.core.incarnation:
            self.host.perform([Send(probe.src, m.ProbeAck(probe.dst, probe.src, probe.nonce, sink.checksum))])
        if write is None:
            return
        if sink.failed:
            self.host.counters.chunks_corrupt += 1
            self._lost(sink, now)
            return
        if sink.staged is not None:
            self.host.write(write, sink.staged, now)
            return
        good = sink.checksum == write.crc
        counters = self.host.counters
        counters.chunks_corrupt += not good
        counters.bytes_received += good * write.slice.nbytes(self._layout)
        if not good:
            sink.wipe()
        self.host.perform(self.host.core.wrote(write.key, write.seq, good, now, spoiled=not good))

    def _lost(self, sink: Sink, now: float) -> None:
        """The rest of a message will not come, or must not go where it was to go."""
        write, spoiled = sink.write, sink.staged is None
        sink.wipe()
        sink.let_go()
        if write:
            self.host.perform(self.host.core.wrote(write.key, write.seq, False, now, spoiled=spoiled))
