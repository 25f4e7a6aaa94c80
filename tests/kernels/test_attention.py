"""Paged attention against one query at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lanewise.kernels.attention import TorchAttention
from lanewise.kernels.plan import Span

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 6, 2, 16
NUM_PAGES = 400


class Case:
    """Sequences with random KV in scattered pages."""

    def __init__(self, shapes: list[tuple[int, int]], page_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(len(shapes) + page_tokens)
        self.dtype = dtype
        self.cache = torch.zeros(2, NUM_PAGES, page_tokens, KV_HEADS, DIM, dtype=dtype)
        order = torch.randperm(NUM_PAGES, generator=generator).tolist()
        self.spans, self.kv, self.queries = [], [], []
        for context, new in shapes:
            pages = [order.pop() for _ in range(-(-(context + new) // page_tokens))]
            kv = torch.randn(2, context + new, KV_HEADS, DIM, generator=generator).to(dtype)
            for token in range(context):
                page, slot = divmod(token, page_tokens)
                self.cache[:, pages[page], slot] = kv[:, token]
            self.spans.append(Span(pages, context, new))
            self.kv.append(kv)
            self.queries.append(torch.randn(new, HEADS, DIM, generator=generator).to(dtype))

    def run(self, attention: TorchAttention, window: int | None, only: int | None = None) -> list[torch.Tensor]:
        """Outputs by sequence, in the order of the shapes."""
        chosen = range(len(self.spans)) if only is None else [only]
        spans = [self.spans[index] for index in chosen]
        plan = attention.plan(spans)
        order = [chosen[index] for index in plan.order]
        query = torch.cat([self.queries[index] for index in order])
        new = [self.kv[index][:, self.spans[index].num_context :] for index in order]
        key, value = (torch.cat([part[which] for part in new]) for which in (0, 1))
        attention.write(plan, self.cache, key, value)
        out = attention.attend(plan, self.cache, query, key, value, window)
        parts = out.split([self.spans[index].num_new for index in order])
        return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]

    def reference(self, index: int, window: int | None) -> torch.Tensor:
        span, (keys, values) = self.spans[index], self.kv[index].double()
        rows = []
        for offset, query in enumerate(self.queries[index].double()):
            stop = span.num_context + offset + 1
            start = 0 if window is None else max(0, stop - window)
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                weights = (keys[start:stop, group] @ query[head] / math.sqrt(DIM)).softmax(0)
                rows.append(weights @ values[start:stop, group])
        return torch.stack(rows).view(-1, HEADS, DIM)


def make(page_tokens: int, dtype: torch.dtype = torch.float32, tile_tokens: int | None = None) -> TorchAttention:
    attention = TorchAttention(DIM, KV_HEADS, page_tokens, dtype, CPU)
    if tile_tokens is not None:
        attention.tile_tokens = tile_tokens
    return attention


SHAPES = [(0, 1), (63, 1), (0, 40), (64, 1), (17, 5), (200, 1), (100, 33), (15, 1), (33, 2)]


@pytest.mark.parametrize("page_tokens", [8, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 20, 64, 1000])
@pytest.mark.parametrize("tile_tokens", [None, 100])
def test_ragged_batches(page_tokens, window, tile_tokens):
    case = Case(SHAPES, page_tokens)
    outputs = case.run(make(page_tokens, tile_tokens=tile_tokens), window)
    for index, output in enumerate(outputs):
        torch.testing.assert_close(output.double(), case.reference(index, window), atol=2e-6, rtol=1e-5)


def test_new_kv_is_written_where_the_pages_say():
    case = Case(SHAPES, 16)
    case.run(make(16), None)
    for span, kv in zip(case.spans, case.kv, strict=True):
        stored = case.cache[:, list(span.pages)].flatten(1, 2)[:, : span.num_tokens]
        assert torch.equal(stored, kv)
    used = {page for span in case.spans for page in span.pages}
    assert not case.cache[:, [page for page in range(NUM_PAGES) if page not in used]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_changes_no_more_than_rounding(dtype):
    case = Case([(context, 1) for context in range(10, 330, 20)], 16, dtype)
    together = case.run(make(16, dtype), None)
    for index, output in enumerate(together):
        (alone,) = case.run(make(16, dtype), None, only=index)
        limit = 1e-6 if dtype == torch.float32 else 2**-7
        assert (output - alone).abs().max() <= limit
        assert (output.double() - case.reference(index, None)).abs().max() < 4 * limit


def test_what_other_sequences_hold_never_leaks():
    """Slots behind the end of a sequence are masked, whatever finite values an earlier owner left there."""
    case = Case([(5, 1), (300, 1)], 16)
    expected = [case.reference(index, None) for index in range(2)]
    page = case.spans[0].pages[0]
    case.cache[:, page, 6:] = 1e30
    for output, reference in zip(case.run(make(16), None), expected, strict=True):
        torch.testing.assert_close(output.double(), reference, atol=2e-6, rtol=1e-5)


def test_tiles_cover_every_decode_row_once_and_pad_little():
    attention = make(16, tile_tokens=512)
    spans = [Span(range(40), context, 1) for context in (600, 10, 20, 300, 15, 100, 0)]
    plan = attention.plan([*spans, Span(range(40), 0, 9)])
    assert [plan.spans[i].num_context for i in range(7)] == [0, 10, 15, 20, 100, 300, 600]
    tiles = plan.view(None).tiles
    rows = [row for tile in tiles for row in range(tile.rows.start, tile.rows.stop)]
    assert rows == list(range(7))
    assert all(tile.num_sequences == 1 or len(tile.table) * 16 <= 512 for tile in tiles)
    assert plan.view(None) is plan.view(None)
