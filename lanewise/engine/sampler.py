"""From logits to the next token of each sequence.

Owns: logit bias, penalties, min_tokens, temperature, top_k, top_p, min_p (in this order), the draw, and logprobs.
Must not: keep state between steps. Everything derives from a sequence's ids and its Sampling, so a token comes out the
same alone, in any batch, and after the request was resumed on another worker.

The draw is argmax(filtered logits / temperature + Gumbel(seed, absolute position)). Filters compare values, so entries
that tie with the last one kept are kept too and the order of the vocabulary never matters. Log probabilities are those
of the model itself: before bias, penalties, temperature and filters.

`draw` gives the device its work and returns. Nothing in it asks a GPU for a value: the answer would come when all that
was launched before is over. A sequence's newest id may be one that the host does not know yet. Seed, position,
min_tokens and filters need to know that it is there, not which id it is. Penalties do: they take it from the tensor
that the draw before has left on the device. So there is no request for which a loop that runs ahead must wait; whether
an id ends its sequence is found out afterwards, by the host (`Sequence.finish`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from lanewise.engine.carried import Carried
from lanewise.engine.sequence import Sequence
from lanewise.kernels.copies import Download, upload
from lanewise.kernels.noise import gumbel
from lanewise.request import Sampling

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them overflows."""
HEAD_ENTRIES = 1024
"""top_p first looks at this many likely entries; only flat distributions need a whole large vocabulary sorted."""
NO_TOP: tuple[tuple[int, float], ...] = ()
NOTHING: Mapping[int, int] = {}


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token. `top` holds as many (id, logprob) as asked for, most likely first."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = NO_TOP


class Drawn:
    """The tokens of one step, on their way to the host."""

    def __init__(self, tokens: torch.Tensor, logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
        """`tokens` [n] int64 chosen from logits [n, vocab]."""
        self.tokens = tokens
        self._tops = [seq.sampling.logprobs for seq in seqs]
        self._vocab = logits.shape[1]
        self._download = Download(tokens, *_logprobs(logits, tokens, self._tops))

    @property
    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._download.done

    def result(self) -> list[Sampled]:
        """Waits for the device."""
        tokens, *rest = self._download.wait()
        ids: list[int] = tokens.tolist()
        if not rest:
            return [Sampled(token_id) for token_id in ids]
        pairs = zip(rest[0].tolist(), rest[1].tolist(), strict=True)
        return [self._with_logprobs(token_id, top, pairs) for token_id, top in zip(ids, self._tops, strict=True)]

    def _with_logprobs(self, token_id: int, num_top: int | None, pairs: Iterator[tuple[int, float]]) -> Sampled:
        if num_top is None:
            return Sampled(token_id)
        _, logprob = next(pairs)
        return Sampled(token_id, logprob, tuple(next(pairs) for _ in range(min(num_top, self._vocab))))


def draw(logits: torch.Tensor, seqs: Seq[Sequence], carried: Carried | None = None) -> Drawn:
    """The next token of each sequence from logits [len(seqs), vocab] in fp32, which are left as they are.

    `carried` names rows (not spans): row i has one id more than seqs[i].ids, and it lies on the device."""
    ahead = NOTHING if carried is None else carried.places
    changed = [index for index, seq in enumerate(seqs) if _changes_logits(seq, index in ahead)]
    drawn = [index for index, seq in enumerate(seqs) if seq.sampling.temperature >= GREEDY_BELOW]
    adjusted = logits.clone() if changed or drawn else logits
    for index in changed:
        newest = None
        if carried is not None and index in ahead:
            newest = carried.tokens[ahead[index] : ahead[index] + 1]
        _adjust(adjusted[index], seqs[index], newest)
    positions = {index: len(seqs[index].ids) + (index in ahead) for index in drawn}
    if adjusted.device.type == "cpu":
        _add_noise(adjusted, seqs, positions)
        # numpy's is several times as fast on one core, and wakes no second pool of threads beside the kernels' own.
        return Drawn(torch.from_numpy(adjusted.numpy().argmax(-1)), logits, seqs)
    if positions:
        add_noise_together(adjusted, seqs, positions)
    return Drawn(adjusted.argmax(-1), logits, seqs)


def _add_noise(logits: torch.Tensor, seqs: Seq[Sequence], positions: Mapping[int, int]) -> None:
    """Temperature, filters and noise on the rows of `positions`, in place. Noise is made only where it can matter."""
    whole: list[int] = []
    for index, position in positions.items():
        sampling = seqs[index].sampling
        row = logits[index].div_(sampling.temperature)
        if not _filters(sampling):
            whole.append(index)
            continue
        filter_logits(row, sampling)
        kept = (row > -math.inf).nonzero()[:, 0]
        row[kept] += gumbel([sampling.seed], [position], kept)[0]
    if whole:
        seeds = [seqs[index].sampling.seed for index in whole]
        at = [positions[index] for index in whole]
        logits[whole] += gumbel(seeds, at, torch.arange(logits.shape[1], device=logits.device))


def add_noise_together(logits: torch.Tensor, seqs: Seq[Sequence], positions: Mapping[int, int]) -> None:
    """As `_add_noise`, for a GPU: all rows at once, in as many operations for one as for all, and no question asked."""
    device = logits.device
    index = upload(list(positions), device)
    samplings = [seqs[row].sampling for row in positions]
    rows = logits.index_select(0, index).div_(_column([sampling.temperature for sampling in samplings], device))
    if any(map(_filters, samplings)):
        filter_rows(rows, samplings)
    entries = torch.arange(rows.shape[1], device=device)
    rows += gumbel([sampling.seed for sampling in samplings], list(positions.values()), entries)
    logits.index_copy_(0, index, rows)


def _filters(sampling: Sampling) -> bool:
    return bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    """[len(values), 1] in fp32."""
    return upload(np.array(values, dtype=np.float32)[:, None], device)


def _changes_logits(seq: Sequence, ahead: bool) -> bool:
    sampling = seq.sampling
    return (
        bool(sampling.logit_bias)
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or seq.num_output + ahead < sampling.min_tokens
    )


def _adjust(row: torch.Tensor, seq: Sequence, newest: torch.Tensor | None) -> None:
    """Bias, penalties and min_tokens on logits [vocab], in place. `newest` [1]: an id after those of `seq`.

    The repetition penalty counts prompt and output, the other two the output alone.
    """
    sampling, num_output = seq.sampling, seq.num_output + (newest is not None)
    if sampling.logit_bias:
        index = upload(list(sampling.logit_bias), row.device)
        bias = upload(np.array(list(sampling.logit_bias.values()), dtype=np.float32), row.device)
        row[index] += bias
    if sampling.repetition_penalty != 1.0:
        seen = upload(sorted(set(seq.ids)), row.device)
        if newest is not None:
            seen = torch.cat((seen, newest))  # one that is there twice is written twice, with the same value
        value = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(value > 0, value / penalty, value * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and num_output:
        output, counts = _counted(seq.ids[seq.num_prompt :], newest, row.device)
        row[output] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if num_output < sampling.min_tokens and (ending := seq.ending_ids()):
        row.index_fill_(0, upload([token for token in ending if token < len(row)], row.device), -math.inf)


def _counted(output: list[int], newest: torch.Tensor | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Every id of the output, and how often it is there; `newest`, counted too, may come twice with the same count."""
    unique, times = np.unique(np.array(output, dtype=np.int64), return_counts=True)
    ids, counts = upload(unique, device), upload(times, device)
    if newest is None:
        return ids, counts
    again = ids == newest
    return torch.cat((ids, newest)), torch.cat((counts + again, (counts * again).sum(0, keepdim=True) + 1))


def filter_logits(row: torch.Tensor, sampling: Sampling) -> None:
    """top_k, top_p and min_p on scaled logits [vocab] of a CPU, in place."""
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
    ordered = torch.from_numpy(-np.sort(-row.numpy()))  # several times faster than torch's
    num_below = int(((ordered - total).exp().cumsum(0) < top_p).sum())
    return ordered[min(num_below, len(row) - 1)]  # rounding may keep the sum below top_p: then everything stays


def filter_rows(rows: torch.Tensor, samplings: Seq[Sampling]) -> None:
    """As `filter_logits` on each row of [n, vocab], in place: everything is a threshold on the sorted row."""
    vocab, device = rows.shape[1], rows.device
    ordered = rows.sort(-1, descending=True).values
    top_k = upload([min(sampling.top_k or vocab, vocab) for sampling in samplings], device)[:, None]
    least = ordered.gather(1, top_k - 1)
    ordered.masked_fill_(ordered < least, -math.inf)
    top_p = _column([sampling.top_p for sampling in samplings], device)
    total = ordered.logsumexp(-1, keepdim=True)
    below = ((ordered - total).exp().cumsum(-1) < top_p).sum(-1, keepdim=True)
    by_mass = ordered.gather(1, below.clamp_(max=vocab - 1)).masked_fill_(top_p >= 1.0, -math.inf)
    shares = [math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf for sampling in samplings]
    by_share = ordered[:, :1] + _column(shares, device)
    rows.masked_fill_(rows < least.maximum(by_mass).maximum(by_share), -math.inf)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, tops: Seq[int | None]) -> tuple[torch.Tensor, ...]:
    """Ids and their log probabilities, one after the other: of each row that wants some its token, then its likeliest.
    Nothing where no row wants any."""
    ids, values = [], []
    for index, num_top in enumerate(tops):
        if num_top is None:
            continue
        logprobs = logits[index].log_softmax(0)
        token = tokens[index : index + 1]
        ids.append(token)
        values.append(logprobs.gather(0, token))
        if num_top:
            top = logprobs.topk(min(num_top, len(logprobs)))
            ids.append(top.indices)
            values.append(top.values)
    return (torch.cat(ids), torch.cat(values)) if ids else ()
