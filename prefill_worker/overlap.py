"""While a batch is computed: tells the sender of finished layers, in groups that are worth sending.

Owns: which layers of the running batch have been announced. Runs on the engine thread, between two layers: it must
cost microseconds. Must not: know pages or wait for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from lanewise.policy.blocks import KVLayout
from lanewise.transfer.grouping import USUAL_BYTES_PER_S, group_ends

Key = tuple[str, int]


class _Sender(Protocol):
    def ready(self, key: Key, tokens: int, layers: range | None = None) -> None: ...


@dataclass(slots=True)
class _Part:
    key: Key
    tokens: int  # ids[0:tokens] are computed when the batch is
    ends: tuple[int, ...]  # layers after which a group is whole
    announced: int = 0  # layers


class Overlap:
    def __init__(self, layout: KVLayout, sender: _Sender, bandwidth: Callable[[Key], float]) -> None:
        """`bandwidth(key)`: measured bytes per second towards the partner of an attempt; 0 where nobody knows."""
        self._layout = layout
        self._sender = sender
        self._bandwidth = bandwidth
        self._parts: list[_Part] = []

    def begin(self, chunks: Iterable[tuple[Key, int, int]], seconds: float = 0.0) -> bool:
        """A batch starts that should take so long: (key, tokens computed before, new tokens) of each sequence in it.

        False: all of it goes whole, so `computed` need not be called before the end. Asking an engine for each layer
        costs it a wait per layer on a GPU."""
        parts = [(key, before, new, self._bandwidth(key)) for key, before, new in chunks]
        total = self._layout.slice_bytes(sum(new for _, _, new, _ in parts), self._layout.num_layers)
        self._parts = []
        for key, before, new, rate in parts:
            layers_sent = seconds * (rate or USUAL_BYTES_PER_S) / total
            self._parts.append(_Part(key, before + new, group_ends(self._layout, new, rate, layers_sent)))
        return any(len(part.ends) > 1 for part in self._parts)

    def computed(self, layer_end: int) -> None:
        """KV of layers 0 to `layer_end` of the batch is in the pool."""
        for part in self._parts:
            whole = max((end for end in part.ends if end <= layer_end), default=0)
            if whole > part.announced:
                self._sender.ready(part.key, part.tokens, range(part.announced, whole))
                part.announced = whole
