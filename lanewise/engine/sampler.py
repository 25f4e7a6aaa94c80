"""From logits to the next token of each sequence.

Owns: logit bias, penalties, min_tokens, temperature, top_k, top_p, min_p (in this order), the draw, and logprobs.
Must not: keep state between steps. Everything derives from a sequence's ids and its Sampling, so a token comes out the
same alone, in any batch, and after the request was resumed on another worker.

The draw is argmax(filtered logits / temperature + Gumbel(seed, absolute position)). Filters compare values, so entries
that tie with the last one kept are kept too and the order of the vocabulary never matters. Log probabilities are those
of the model itself: before bias, penalties, temperature and filters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from lanewise.engine.sequence import Sequence
from lanewise.kernels.noise import gumbel
from lanewise.request import Sampling

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them overflows."""
HEAD_ENTRIES = 1024
"""top_p first looks at this many likely entries; only flat distributions need a whole large vocabulary sorted."""
NO_TOP: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token. `top` holds as many (id, logprob) as asked for, most likely first."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = NO_TOP


def sample(logits: torch.Tensor, seqs: Seq[Sequence]) -> list[Sampled]:
    """The next token of each sequence from logits [len(seqs), vocab] in fp32, which are left as they are."""
    chosen = _choose(logits, seqs)
    return [
        Sampled(token_id) if seq.sampling.logprobs is None else _with_logprobs(row, token_id, seq.sampling.logprobs)
        for row, token_id, seq in zip(logits, chosen, seqs, strict=True)
    ]


def _choose(logits: torch.Tensor, seqs: Seq[Sequence]) -> list[int]:
    changed = [index for index, seq in enumerate(seqs) if _changes_logits(seq)]
    drawn = [index for index, seq in enumerate(seqs) if seq.sampling.temperature >= GREEDY_BELOW]
    if changed or drawn:
        logits = logits.clone()
    for index in changed:
        _adjust(logits[index], seqs[index])
    _draw(logits, {index: seqs[index] for index in drawn})
    # numpy's is several times as fast on one core, and wakes no second pool of threads beside the kernels' own.
    best = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)
    ids: list[int] = best.tolist()
    return ids


def _draw(logits: torch.Tensor, drawn: dict[int, Sequence]) -> None:
    """Temperature, filters and noise on these rows of logits, in place. Noise is made only where it can matter."""
    whole: list[int] = []
    for index, seq in drawn.items():
        row, sampling = logits[index].div_(seq.sampling.temperature), seq.sampling
        if not sampling.top_k and sampling.top_p >= 1.0 and not sampling.min_p:
            whole.append(index)
            continue
        filter_logits(row, sampling)
        kept = (row > -math.inf).nonzero()[:, 0]
        row[kept] += gumbel([sampling.seed], [len(seq.ids)], kept)[0]
    if whole:
        seeds = [drawn[index].sampling.seed for index in whole]
        positions = [len(drawn[index].ids) for index in whole]
        logits[whole] += gumbel(seeds, positions, torch.arange(logits.shape[1], device=logits.device))


def _changes_logits(seq: Sequence) -> bool:
    sampling = seq.sampling
    return (
        bool(sampling.logit_bias)
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or seq.num_output < sampling.min_tokens
    )


def _adjust(row: torch.Tensor, seq: Sequence) -> None:
    """Bias, penalties and min_tokens on logits [vocab], in place.

    The repetition penalty counts prompt and output, the other two the output alone.
    """
    sampling = seq.sampling
    if sampling.logit_bias:
        index = _index(row, list(sampling.logit_bias))
        row[index] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device)
    if sampling.repetition_penalty != 1.0:
        seen = _index(row, sorted(set(seq.ids)))
        value = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(value > 0, value / penalty, value * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and seq.num_output:
        output, counts = torch.unique(_index(row, seq.ids[seq.num_prompt :]), return_counts=True)
        row[output] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if seq.num_output < sampling.min_tokens and (ending := seq.ending_ids()):
        row[_index(row, [token for token in ending if token < len(row)])] = -math.inf


def _index(row: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=row.device)


def filter_logits(row: torch.Tensor, sampling: Sampling) -> None:
    """top_k, top_p and min_p on scaled logits [vocab], in place."""
    if 0 < sampling.top_k < len(row):
        row.masked_fill_(row < row.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1.0:
        row.masked_fill_(row < _top_p_threshold(row, sampling.top_p), -math.inf)
    if sampling.min_p > 0.0:
        row.masked_fill_(row < row.max() + math.log(sampling.min_p), -math.inf)


def _top_p_threshold(row: torch.Tensor, top_p: float) -> torch.Tensor:
    """The logit of the last of the fewest most likely entries that together reach `top_p`; there is at least one."""
    total = row.logsumexp(0)
    if len(row) > 8 * HEAD_ENTRIES:
        head = row.topk(HEAD_ENTRIES).values
        num_below = int(((head - total).exp().cumsum(0) < top_p).sum())
        if num_below < HEAD_ENTRIES:
            return head[num_below]
    # numpy sorts floats several times faster than torch does on a CPU.
    ordered = torch.from_numpy(-np.sort(-row.numpy())) if row.device.type == "cpu" else row.sort(descending=True).values
    num_below = int(((ordered - total).exp().cumsum(0) < top_p).sum())
    return ordered[min(num_below, len(row) - 1)]  # rounding may keep the sum below top_p: then everything stays


def _with_logprobs(row: torch.Tensor, token_id: int, num_top: int) -> Sampled:
    logprobs = row.log_softmax(0)
    top = NO_TOP
    if num_top:
        values, ids = logprobs.topk(min(num_top, len(row)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token_id, float(logprobs[token_id]), top)
