"""Captured pieces of a forward pass, by its number of new tokens: all between two calls of attention is one graph.

Owns: the sizes, what passes from piece to piece, replaying them with attention in between. Must not: choose between
pieces and whole graphs (graphs.py does), or change what is computed: rows that fill up have no slot for their KV.
**Not yet run on a GPU**; on a CPU the same pieces are computed from the same buffers in Triton's interpreter.

Attention is launched as it is without graphs, over the rows that are there, so any number of sequences of any context
fits. Between two pieces the host has its turn: KV can be announced layer by layer, which a whole graph does not allow.
Beyond PIECE_ROWS a device computes for much longer than the host takes to launch, and filling up would cost more.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial

import torch

from lanewise.engine.capturing import Recorder
from lanewise.engine.model import OnLayers
from lanewise.engine.triton_model import TritonDecoder
from lanewise.kernels.triton_attention import TritonPlan

PIECE_ROWS = (16, 32, 64, 96, 128, 192, 256, *range(288, 513, 32), *range(576, 1025, 64))
"""From 256 on filled up by at most an eighth."""


class Pieces:
    """Of one decoder. `inputs`: its buffers `ids`, `positions` and `slots`, of as many rows as the largest size."""

    def __init__(self, decoder: TritonDecoder, inputs: dict[str, torch.Tensor], max_rows: int) -> None:
        self._decoder = decoder
        self._inputs = inputs
        self.sizes = [rows for rows in PIECE_ROWS if rows <= max_rows]
        self._graphs: dict[int, list[torch.cuda.CUDAGraph] | None] = {}
        config, device, dtype = decoder.config, inputs["ids"].device, decoder.weights.norm.dtype
        most, half = max(self.sizes, default=0), config.head_dim // 2

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros((most, *shape), dtype=dtype, device=device)

        self._hidden, self._cos, self._sin = zeros(config.hidden_size), zeros(half), zeros(half)
        self._query, self._mixed = (zeros(config.num_heads, config.head_dim) for _ in range(2))

    def prepare(self, recorder: Recorder | None) -> None:
        """Captures what the budget allows; without a recorder every size is computed as it comes."""
        for rows in reversed(self.sizes):
            if recorder is None:
                self._graphs[rows] = None
            elif not recorder.spent:
                numbers = range(len(self._decoder.weights.layers) + 1)
                self._graphs[rows] = [recorder.record(partial(self._piece, number, rows))[0] for number in numbers]

    def choose(self, num_rows: int) -> int | None:
        """The smallest size that holds so many rows; None: there is none."""
        return min((rows for rows in self._graphs if rows >= num_rows), default=None)

    @property
    def captured(self) -> Seq[int]:
        return sorted(self._graphs)

    def run(self, rows: int, plan: TritonPlan[torch.Tensor], on_layers: OnLayers | None) -> torch.Tensor:
        """Hidden states [new tokens, hidden] before the last norm, until the next run. `inputs` hold `rows` rows."""
        count = plan.ends[-1]
        decoder, graphs = self._decoder, self._graphs[rows]
        for number in range(len(decoder.weights.layers) + 1):
            if graphs is None:
                self._piece(number, rows)
            else:
                graphs[number].replay()
            if number < len(decoder.weights.layers):
                if on_layers is not None:
                    on_layers(number, number + 1)
                decoder.attend(number, plan, self._query[:count], self._mixed[:count])
        return self._hidden[:count]

    def _piece(self, number: int, rows: int) -> None:
        """What follows attention of layer `number` - 1, and what goes before that of `number`."""
        decoder, inputs = self._decoder, self._inputs
        hidden, cos, sin = self._hidden[:rows], self._cos[:rows], self._sin[:rows]
        update = None
        if number == 0:
            hidden.copy_(decoder.embed(inputs["ids"][:rows]))
            for kept, part in zip((cos, sin), decoder.angles(inputs["positions"][:rows]), strict=True):
                kept.copy_(part)
        else:
            update = decoder.after_attention(number - 1, hidden, self._mixed[:rows])
        if number < len(decoder.weights.layers):
            slots = inputs["slots"][:rows]
            decoder.before_attention(number, hidden, update, slots, cos, sin, self._query[:rows])
        elif update is not None:
            hidden.add_(update)
