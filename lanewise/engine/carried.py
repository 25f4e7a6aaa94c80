"""Ids that the host does not know yet: a launch takes them where the launch before has left them, on the device.

Owns: which sampled id is the new id of which sequence, and putting it among the ids of a batch.
Must not: make the host wait for the device, or know sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from lanewise.kernels.copies import upload


@dataclass(frozen=True, slots=True)
class Carried:
    """The one new id of span i of a batch is tokens[places[i]]. `tokens`: [n] int64, what the launch before sampled.

    In the ids that go with it such a span has some other id, which is not looked at.
    """

    tokens: torch.Tensor
    places: Mapping[int, int]

    @classmethod
    def elsewhere(cls, spans: Seq[int], device: torch.device) -> Carried:
        """Of these spans, whose ids another rank has: as many zeros, to be overwritten by them."""
        return cls(torch.zeros(len(spans), dtype=torch.int64, device=device), {s: i for i, s in enumerate(spans)})

    def of(self, spans: Seq[int]) -> Carried:
        """The same for these spans alone, which are then counted as they come here."""
        return Carried(self.tokens, {row: self.places[span] for row, span in enumerate(spans) if span in self.places})

    def ids(self) -> torch.Tensor:
        """[len(places)] in the order of `places`."""
        return self.tokens.index_select(0, upload(list(self.places.values()), self.tokens.device))

    def put(self, ids: torch.Tensor, rows: torch.Tensor, ends: Mapping[int, int] | Seq[int]) -> None:
        """`ids` [len(places)] into the rows [N] of a batch in which the rows of span i end before ends[i]."""
        at = upload([ends[index] - 1 for index in self.places], rows.device)
        rows.index_copy_(0, at, ids)

    def known(self, ids: Seq[Seq[int]]) -> list[Seq[int]]:
        """The ids of all spans, for a decoder that reads them on the host: on a CPU, where nothing is ahead of it."""
        tokens = self.tokens.tolist()
        return [[tokens[self.places[index]]] if index in self.places else part for index, part in enumerate(ids)]
