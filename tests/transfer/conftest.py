"""Two real endpoints over real sockets with numpy pools of different page sizes, for the tests of the KV channel."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from lanewise.policy.blocks import KVLayout
from lanewise.request import Token
from lanewise.transfer import Endpoint, Faults, Limits, Peer, Receiver, Sender, Timers
from lanewise.transfer.ipc_link import Device
from lanewise.transfer.keys import Security
from lanewise.transfer.trial import References

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32", dtype_bytes=4)
CACHE_KEY = b"k" * 32
FIELDS = {"protocol": "1", "weights": "abc", "kv_dtype": "float32"}
FAST = Timers(
    hello_s=0.25,
    rehello_s=0.2,
    grant_wait_s=1.0,
    begin_resend_s=0.2,
    hold_begin_s=0.5,
    ack_resend_s=0.1,
    ack_abort_s=0.7,
    commit_ack_s=0.15,
    abort_ack_s=0.1,
    lease_s=1.5,
    ping_s=0.2,
    tombstone_s=5.0,
)
STEADY = replace(FAST, hello_s=1.0, grant_wait_s=5.0, ack_abort_s=3.0, ping_s=0.4, lease_s=6.0)
"""For tests in which new processes start and sockets reconnect, on a machine that may be busy."""


class NumpyStore:
    """A pool [layer][K|V][page][token in page][head and dim]; `pages` is a list of page numbers."""

    def __init__(self, layout: KVLayout, num_pages: int, page_tokens: int, head_shards: int = 1) -> None:
        self.layout = layout
        self.page_tokens = page_tokens
        self.head_shards = head_shards  # as if so many processes held it
        self._head_bytes = layout.head_dim * layout.dtype_bytes
        row = layout.num_kv_heads * self._head_bytes
        self.pool = np.zeros((layout.num_layers, 2, num_pages, page_tokens, row), np.uint8)
        self.free = list(range(num_pages))
        self.before_write: Callable[[], None] = lambda: None
        self.written = 0
        self.device_memory: Device | None = None
        self.in_place = False  # whether chunks may be sent from pages and received into them without a copy between

    def take(self, tokens: int) -> list[int]:
        count = -(-tokens // self.page_tokens)
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count, "the test's pool is too small"
        return taken

    def _at(self, pages: list[int], tokens: range) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(tokens.start, tokens.stop)
        return np.asarray(pages)[index // self.page_tokens], index % self.page_tokens

    def _in_row(self, heads: range) -> slice:
        return slice(heads.start * self._head_bytes, heads.stop * self._head_bytes)

    def read(
        self, pages: list[int], tokens: range, layers: range, heads: range, out: np.ndarray | None = None
    ) -> np.ndarray:
        page, slot = self._at(pages, tokens)
        found = self.pool[layers.start : layers.stop, ..., self._in_row(heads)][:, :, page, slot].reshape(-1)
        if out is None:
            return found
        out[:] = found
        return out

    def write(self, pages: list[int], tokens: range, layers: range, heads: range, data: memoryview) -> None:
        self.before_write()
        page, slot = self._at(pages, tokens)
        block = np.frombuffer(data, np.uint8).reshape(len(layers), 2, len(tokens), -1)
        self.pool[layers.start : layers.stop, ..., self._in_row(heads)][:, :, page, slot] = block
        self.written += len(data)

    def views(self, pages: list[int], tokens: range, layers: range, heads: range) -> list[memoryview] | None:
        return self.pieces(pages, tokens, layers, heads) if self.in_place else None

    def pieces(self, pages: list[int], tokens: range, layers: range, heads: range) -> list[memoryview]:
        flat = [self.pool[layer, plane].reshape(-1) for layer in layers for plane in (0, 1)]
        row, part = self.pool.shape[-1], self._in_row(heads)
        starts = [(pages[t // self.page_tokens] * self.page_tokens + t % self.page_tokens) * row for t in tokens]
        return [memoryview(plane[start + part.start : start + part.stop]) for plane in flat for start in starts]


Dress = Callable[[NumpyStore], None]
"""Makes a store another kind of memory before anybody uses it."""


@dataclass
class Log:
    """Events in order, with waiting that has a deadline."""

    events: list[Any] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    react: Callable[[Any], None] = lambda event: None

    def __call__(self, event: Any) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()
        self.react(event)

    def of(self, kind: type, key: Any = None) -> list[Any]:
        return [e for e in list(self.events) if isinstance(e, kind) and (key is None or getattr(e, "key", None) == key)]

    def wait(self, kind: type | tuple[type, ...], key: Any = None, timeout: float = 8.0) -> Any:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        end = time.monotonic() + timeout
        with self.changed:
            while True:
                for event in self.events:
                    if isinstance(event, kinds) and (key is None or getattr(event, "key", None) == key):
                        return event
                left = end - time.monotonic()
                assert left > 0, f"no {kinds} for {key} in {timeout} s; got {self.events[-8:]}"
                self.changed.wait(left)


def eventually(condition: Callable[[], bool], what: str, timeout: float = 8.0) -> None:
    end = time.monotonic() + timeout
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"not in {timeout} s: {what}"
        tick.wait(0.002)


def endpoint(**change: Any) -> Endpoint:
    facts: dict[str, Any] = {
        "incarnation": str(uuid.uuid4()),
        "fingerprint": "f" * 64,
        "fingerprint_fields": FIELDS,
        "layout": LAYOUT,
    }
    return Endpoint(**(facts | change))


def everything(layout: KVLayout) -> tuple[range, range]:
    """All layers and all heads."""
    return range(layout.num_layers), range(layout.num_kv_heads)


class Prefill:
    def __init__(
        self,
        identity: Endpoint,
        faults: Faults | None,
        timers: Timers,
        limits: Limits,
        security: Security | None = None,
        group_host: str = "",
        group_device: str = "cpu",
        direct: bool = True,
        references: References = References.AUTO,
        head_shards: int = 1,
        dress: Dress = lambda store: None,
    ) -> None:
        self.identity = identity
        self.store = NumpyStore(identity.layout, 512, 8, head_shards)
        dress(self.store)
        self.log = Log()
        options = {"timers": timers, "limits": limits, "security": security, "group_host": group_host}
        options["group_device"] = group_device
        options |= {"direct": direct, "references": references}
        self.sender = Sender(identity, self.store, self.log, faults, **options)
        self.sender.start()

    def compute(self, ids: list[int], seed: int = 0) -> list[int]:
        pages = self.store.take(len(ids))
        dice = np.random.default_rng([seed, len(ids)])
        self.store.pool[:, :, pages] = dice.integers(0, 256, self.store.pool[:, :, pages].shape, np.uint8)
        return pages

    def kv(self, pages: list[int], tokens: range) -> np.ndarray:
        return self.store.read(pages, tokens, *everything(self.identity.layout))


class Decode:
    def __init__(
        self,
        identity: Endpoint,
        faults: Faults | None,
        timers: Timers,
        limits: Limits,
        listen: str,
        security: Security | None = None,
        group_host: str = "",
        group_device: str = "cpu",
        direct: bool = True,
        dress: Dress = lambda store: None,
    ) -> None:
        self.identity = identity
        self.store = NumpyStore(identity.layout, 256, 16)
        dress(self.store)
        self.log = Log()
        options = {"timers": timers, "limits": limits, "security": security, "group_host": group_host}
        options["group_device"] = group_device
        options["direct"] = direct
        self.receiver = Receiver(identity, self.store, self.log, faults, listen=listen, **options)
        self.address = self.receiver.start()
        self.peer = Peer(self.address, identity.incarnation)
        self.pages: dict[Any, list[int]] = {}

    def grant_all(self, have_tokens: int = 0) -> None:
        """Answers every offer at once, as a decode loop with room would."""

        def react(event: Any) -> None:
            if type(event).__name__ == "Offered":
                self.pages[event.key] = self.store.take(event.tokens)
                self.receiver.grant(event.key, self.pages[event.key], have_tokens)

        self.log.react = react

    def kv(self, key: Any, tokens: range) -> np.ndarray:
        return self.store.read(self.pages[key], tokens, *everything(self.identity.layout))


class Net:
    """Makes endpoints and closes them all; no test may leave an internal error behind."""

    eventually = staticmethod(eventually)
    endpoint = staticmethod(endpoint)
    fast = FAST
    steady = STEADY
    layout = LAYOUT
    cache_key = CACHE_KEY
    limits = Limits

    def __init__(self, direct: bool = True) -> None:
        self.sides: list[Any] = []
        self.direct = direct

    def prefill(
        self,
        identity: Endpoint | None = None,
        faults: Faults | None = None,
        timers: Timers | None = None,
        limits: Limits | None = None,
        security: Security | None = None,
        group_host: str = "",
        group_device: str = "cpu",
        references: References = References.AUTO,
        head_shards: int = 1,
        dress: Dress = lambda store: None,
    ) -> Prefill:
        limits = limits or Limits(chunk_bytes=4096)
        settings = (
            timers or Timers(),
            limits,
            security,
            group_host,
            group_device,
            self.direct,
            references,
            head_shards,
            dress,
        )
        side = Prefill(identity or endpoint(), faults, *settings)
        self.sides.append(side.sender)
        return side

    def decode(
        self,
        identity: Endpoint | None = None,
        faults: Faults | None = None,
        timers: Timers | None = None,
        limits: Limits | None = None,
        listen: str = "tcp://127.0.0.1:0",
        security: Security | None = None,
        group_host: str = "",
        group_device: str = "cpu",
        dress: Dress = lambda store: None,
    ) -> Decode:
        settings = (
            timers or Timers(),
            limits or Limits(),
            listen,
            security,
            group_host,
            group_device,
            self.direct,
            dress,
        )
        side = Decode(identity or endpoint(), faults, *settings)
        self.sides.append(side.receiver)
        return side

    def pair(self, **options: Any) -> tuple[Prefill, Decode]:
        return self.prefill(**options), self.decode(**options)

    @staticmethod
    def token(key: Any) -> Token:
        return Token(*key, index=0, token_id=17, logprob=-0.5, top=((17, -0.5), (4, -1.25)))

    def close(self) -> None:
        for side in self.sides:
            side.close(0.2)
        assert [side.snapshot().internal_errors for side in self.sides] == [0] * len(self.sides)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What the channel does in good times and under faults is asked of both ways that data may go."""
    if "net" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in ("test_happy", "test_faults"):
        metafunc.parametrize("net", ["direct", "zmq"], indirect=True)


@pytest.fixture
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    net = Net(direct=getattr(request, "param", "direct") == "direct")
    yield net
    net.close()
