"""One attempt of a request as the engine sees it: its token ids, how far its KV is computed, when it ends.

Owns: the counting of prompt, output and computed ids, and the rule that ends a sequence.
Must not: allocate pages (the pool does), know text, transports, clocks or torch.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from lanewise.request import FinishReason, Sampling


def no_pages() -> array[int]:
    return array("i")


@dataclass(slots=True, eq=False)
class Sequence:
    """`ids` holds prompt, resumed and new output ids; the absolute position of a token is its index in `ids`.

    `num_prompt` counts the prompt alone: penalties, token indices and min/max tokens count from there, so a request
    that is resumed elsewhere behaves as if it had never moved.
    """

    key: tuple[str, int]
    ids: list[int]
    num_prompt: int
    sampling: Sampling
    eos_ids: frozenset[int] = frozenset()
    max_context_tokens: int | None = None  # None: only max_tokens limits it
    num_computed: int = 0  # ids[0:num_computed] have their KV in `pages`
    num_ahead: int = 0  # of the tokens after these, so many are being computed by launches whose results are not taken
    cached_tokens: int = 0  # of these, how many came from the prefix cache at the last attach
    pages: array[int] = field(default_factory=no_pages)  # C ints: kernels read them where they are

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def num_launched(self) -> int:
        """Tokens computed or being computed: one more than there are ids where the last id is not known yet."""
        return self.num_computed + self.num_ahead

    @property
    def num_uncomputed(self) -> int:
        """Ids that no launch has taken. 0: its next token is being sampled."""
        return len(self.ids) - self.num_computed - self.num_ahead

    @property
    def ends_next(self) -> bool:
        """Whether the next token is the last, whatever it is."""
        full = self.max_context_tokens is not None and len(self.ids) + 1 >= self.max_context_tokens
        return full or self.num_output + 1 >= self.sampling.max_tokens

    def ending_ids(self) -> frozenset[int]:
        """Ids that end the sequence once `min_tokens` outputs are there; masked before."""
        stop = self.sampling.stop_token_ids
        return stop if self.sampling.ignore_eos else stop | self.eos_ids

    def finish(self, token_id: int) -> FinishReason | None:
        """Whether the sequence ends with `token_id`, which is already the last of `ids`. Pure."""
        if self.num_output > self.sampling.min_tokens and token_id in self.ending_ids():
            return FinishReason.STOP
        if self.num_output >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        if self.max_context_tokens is not None and len(self.ids) >= self.max_context_tokens:
            return FinishReason.LENGTH
        return None
