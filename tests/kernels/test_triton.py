"""The Triton kernels against references in float64: on a GPU, or in Triton's interpreter, for which sizes are tiny."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported and when a kernel is defined
pytest.importorskip("triton")

from lanewise.engine.quantise import Linear, apply, quantise
from lanewise.kernels.plan import Span
from lanewise.kernels.triton_attention import TritonAttention
from lanewise.kernels.triton_bytes import bytes_product
from lanewise.kernels.triton_rows import add_norm, gather, rotate_and_write, scatter

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, PAGE, PAGES = 6, 2, 16, 8, 40


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


class Batch:
    """Sequences whose KV, old and new, is in scattered pages; slots of nobody hold values that would show."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> None:
        order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1)).tolist()
        self.cache = torch.full((2, PAGES, PAGE, KV_HEADS, DIM), 1e4, dtype=dtype, device=DEVICE)
        self.spans, self.kv, queries = [], [], []
        for number, (context, new) in enumerate(shapes):
            pages = [order.pop() for _ in range(-(-(context + new) // PAGE))]
            kv = random(2, context + new, KV_HEADS, DIM, seed=number, dtype=dtype)
            for token in range(context + new):
                self.cache[:, pages[token // PAGE], token % PAGE] = kv[:, token]
            self.spans.append(Span(pages, context, new))
            self.kv.append(kv)
            queries.append(random(new, HEADS, DIM, seed=100 + number, dtype=dtype))
        self.query = torch.cat(queries)

    def reference(self, window: int | None) -> torch.Tensor:
        rows, at = [], 0
        for span, kv in zip(self.spans, self.kv, strict=True):
            keys, values = kv.double()
            for position in range(span.num_context, span.num_tokens):
                low = 0 if window is None else max(0, position + 1 - window)
                for head in range(HEADS):
                    group = head // (HEADS // KV_HEADS)
                    scores = keys[low : position + 1, group] @ self.query[at, head].double() * DIM**-0.5
                    rows.append(scores.softmax(0) @ values[low : position + 1, group])
                at += 1
        return torch.stack(rows).view(-1, HEADS, DIM)


def attention(dtype: torch.dtype = torch.float32) -> TritonAttention:
    made = TritonAttention(DIM, KV_HEADS, PAGE, dtype, DEVICE)
    made.block_tokens, made.tile_rows, made.split_tokens = 16, 16, 32
    return made


@pytest.mark.parametrize("window", [None, 1, 20])
def test_ragged_batches(window):
    batch = Batch([(0, 1), (40, 1), (0, 20), (63, 1), (17, 5), (10, 18)])
    kernels = attention()
    plan = kernels.plan(batch.spans)
    out = kernels.attend(plan, batch.cache, batch.query, window)
    torch.testing.assert_close(out.double(), batch.reference(window), atol=3e-6, rtol=1e-5)


def test_half_precision():
    batch = Batch([(40, 1), (9, 12)], torch.float16)
    kernels = attention(torch.float16)
    out = kernels.attend(kernels.plan(batch.spans), batch.cache, batch.query, None)
    torch.testing.assert_close(out.double(), batch.reference(None), atol=4e-3, rtol=1e-2)


def test_a_row_does_not_depend_on_its_company():
    batch, kernels = Batch([(40, 1), (63, 1), (0, 20)]), attention()
    together = kernels.attend(kernels.plan(batch.spans), batch.cache, batch.query, None)
    for index, rows in enumerate([slice(0, 1), slice(1, 2), slice(2, 22)]):
        alone = kernels.attend(kernels.plan(batch.spans[index : index + 1]), batch.cache, batch.query[rows], None)
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("form", ["full", "int8"])
def test_a_whole_model_agrees_with_torch(form, tmp_path):
    """Every fused phase in its place: a prompt in two chunks, then decode, with head norms, a window and biases."""
    import transformers

    from lanewise.config import WorkerConfig
    from lanewise.engine.runner import Engine, Work
    from lanewise.engine.sequence import Sequence
    from lanewise.request import Sampling

    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
        attention_bias=True, use_sliding_window=True, sliding_window=9, max_window_layers=1,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    found = []
    for kernels in ("torch", "triton"):
        settings = WorkerConfig(
            model=str(tmp_path),
            kernels=kernels,
            device=DEVICE.type,
            dtype="float32",
            threads=1,
            kv_cache_bytes=1 << 20,
            weights=form,
        )
        engine = Engine.load(settings)
        assert engine.kernels.startswith(kernels)  # on a GPU: "triton, graphs"
        seq = Sequence(("a", 1), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], 11, Sampling(3, temperature=0.0, logprobs=64))
        assert engine.pool.ensure(seq, 16)
        assert engine.step([Work(seq, 6)]) == [None]
        for _ in range(2):
            (sampled,) = engine.step([Work(seq, seq.num_uncomputed)])
            assert sampled is not None
            found.append(torch.tensor([value for _, value in sorted(sampled.top)]))
            seq.ids.append(sampled.token_id)
    for left, right in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)


def test_head_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="head size 48"):
        TritonAttention(48, KV_HEADS, PAGE, torch.float32, DEVICE)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [1, 17])
def test_products_with_int8_weights(count, with_bias):
    layer = quantise(Linear(random(70, 40), random(70, seed=1) if with_bias else None), "int8")
    rows = random(count, 40, seed=2)
    assert layer.scales is not None
    found = bytes_product(rows, layer.weight, layer.scales, layer.bias)
    torch.testing.assert_close(found, apply(layer, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_update", [False, True])
def test_norm_adds_and_rounds_like_the_reference(with_update):
    hidden, update, weight = random(3, 96), random(3, 96, seed=1), random(96, seed=2)
    total = hidden + update if with_update else hidden.clone()
    out = add_norm(hidden, update if with_update else None, weight, 1e-6)
    wide = total.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hidden, total)


@pytest.mark.parametrize("with_norm", [False, True])
def test_heads_are_normed_rotated_and_written(with_norm):
    rows, slots = 3, torch.tensor([5, 17, 160], device=DEVICE)
    qkv = random(rows, HEADS + 2 * KV_HEADS, DIM)
    angles = random(rows, DIM // 2, seed=3)
    norms = (random(DIM, seed=4), random(DIM, seed=5)) if with_norm else None
    cache = torch.zeros(2, PAGES, PAGE, KV_HEADS, DIM, device=DEVICE)
    query = rotate_and_write(qkv, cache, slots, angles.cos(), angles.sin(), norms, 1e-6)

    def turned(part: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        wide = part.double()
        if norm is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
        left, right = wide.chunk(2, -1)
        cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
    torch.testing.assert_close(query.double(), turned(q, norms and norms[0]), atol=1e-6, rtol=1e-5)
    flat = cache.flatten(1, 2)
    torch.testing.assert_close(flat[0, slots].double(), turned(k, norms and norms[1]), atol=1e-6, rtol=1e-5)
    assert torch.equal(flat[1, slots], v)
    assert int((cache != 0).any(-1).any(-1).sum()) == 2 * rows


def test_pages_are_gathered_and_scattered():
    cache, slots = random(2, PAGES, PAGE, KV_HEADS, DIM), torch.tensor([7, 0, 300, 8], device=DEVICE)
    rows = gather(cache, slots)
    assert torch.equal(rows, cache.flatten(1, 2)[:, slots])
    other = torch.zeros_like(cache)
    scatter(other, slots, rows)
    assert torch.equal(other.flatten(1, 2)[:, slots], rows)
    assert int((other != 0).any(-1).any(-1).sum()) == 2 * len(slots)
