"""What may happen to pages between the CHUNK that names them and their copy, whoever copies.

Owns: holding copies back, and what must come of pages that change meanwhile. Must not: know how they are copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from lanewise.transfer import Aborted, Committed
from tests.transfer.test_direct import arrives, begin


class Gate:
    """Holds every call of a function until it is let go."""

    def __init__(self) -> None:
        self.waiting, self.open = threading.Event(), threading.Event()

    def before(self, real: Callable[..., None]) -> Callable[..., None]:
        def held(*args: object) -> None:
            self.waiting.set()
            assert self.open.wait(8)
            real(*args)

        return held


def reused_pages_are_never_accepted(net, prefill, decode, gate: Gate) -> None:
    pages = begin(net, prefill, decode, ("r", 1))
    assert gate.waiting.wait(8)
    prefill.sender.abort(("r", 1), "test")
    prefill.log.wait(Aborted, ("r", 1))
    prefill.store.pool[:, :, pages] = 99  # whoever has the pages now
    gate.open.set()
    decode.log.wait(Aborted, ("r", 1))
    arrives(net, prefill, decode, ("r", 2))
    assert not decode.log.of(Committed, ("r", 1))
    others = np.setdiff1d(np.arange(decode.store.pool.shape[2]), decode.pages["r", 2])
    assert not decode.store.pool[:, :, others].any(), "bytes that were never verified are in pages"


def changed_pages_end_their_transfer(net, prefill, decode, gate: Gate) -> None:
    pages = begin(net, prefill, decode, ("r", 1))
    assert gate.waiting.wait(8)
    prefill.store.pool[:, :, pages] ^= 1
    gate.open.set()
    assert "changed while it was sent" in prefill.log.wait(Aborted, ("r", 1)).reason
    decode.log.wait(Aborted, ("r", 1))
    assert not decode.log.of(Committed)
