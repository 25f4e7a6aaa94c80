"""Single native kernels against float64: ragged attention over scattered pages, products of every height."""

from __future__ import annotations

import pytest
import torch

from lanewise.engine.quantise import Linear, apply, quantise
from lanewise.kernels.cpu_build import VARIANTS, CannotBuild, Variant, cpu_flags
from lanewise.kernels.native import Model, NativeDecoder, Packer, available, load
from tests.kernels.emulated import EMULATED
from tests.kernels.test_attention import DIM, HEADS, KV_HEADS, Case

SHAPES = [(0, 1), (63, 1), (0, 40), (64, 1), (17, 5), (200, 1), (100, 33), (15, 1), (33, 2)]


@pytest.fixture(scope="module", params=["best", "emulated tiles"])
def variant(request: pytest.FixtureRequest) -> Variant:
    try:
        if request.param == "best":
            return available()
        load(EMULATED)
    except CannotBuild as error:
        pytest.skip(str(error))
    return EMULATED


def decoder(variant: Variant, page_tokens: int, dtype: torch.dtype, threads: int = 2) -> NativeDecoder:
    model = Model(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, page_tokens=page_tokens)
    return NativeDecoder(variant, model, dtype == torch.bfloat16, threads)


def filled(page_tokens: int, dtype: torch.dtype) -> tuple[Case, torch.Tensor]:
    """Sequences with all their KV in pages; slots of nobody hold what would show if it were read."""
    case = Case(SHAPES, page_tokens, dtype)
    case.cache.fill_(1e4)
    for span, kv in zip(case.spans, case.kv, strict=True):
        for token in range(span.num_tokens):
            case.cache[:, span.pages[token // page_tokens], token % page_tokens] = kv[:, token]
    return case, torch.cat(case.queries)


@pytest.mark.parametrize("page_tokens", [8, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 20, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_attention(variant, page_tokens, window, dtype):
    case, query = filled(page_tokens, dtype)
    out = decoder(variant, page_tokens, dtype).attend(case.spans, case.cache, query, window)
    expected = torch.cat([case.reference(index, window) for index in range(len(case.spans))])
    limit = 2e-6 if dtype == torch.float32 else 2**-6
    assert (out.double() - expected).abs().max() < limit


def test_company_and_threads_change_no_bit(variant):
    case, query = filled(16, torch.bfloat16)
    together = decoder(variant, 16, torch.bfloat16).attend(case.spans, case.cache, query, None)
    start = 0
    for span in case.spans:
        rows = slice(start, start := start + span.num_new)
        alone = decoder(variant, 16, torch.bfloat16, threads=1).attend([span], case.cache, query[rows], None)
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "columns"), [(64, 32), (96, 1376), (770, 64), (80, 70)])
def test_products_of_every_height(variant, dtype, k, columns):
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(columns, k, generator=generator).to(dtype)
    rows = torch.randn(211, k, generator=generator).to(dtype)
    packed, kernels = Packer(variant, 2).pack(weight), decoder(variant, 16, dtype)
    whole = kernels.multiply(rows, packed, columns)
    expected = rows.double() @ weight.double().T
    assert (whole.double() - expected).abs().max() < 1e-3
    for height in (*range(1, 41), 95, 96, 97, 193):  # every tile, and both sides of a block
        assert torch.equal(kernels.multiply(rows[:height], packed, columns), whole[:height])
    for threads in (1, 3):
        assert torch.equal(decoder(variant, 16, dtype, threads).multiply(rows, packed, columns), whole)


@pytest.mark.parametrize("variant_of", [*VARIANTS, EMULATED], ids=lambda variant: variant.name)
@pytest.mark.parametrize("form", ["int8", "fp8", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_with_weights_of_one_byte(variant_of, form, dtype):
    if not variant_of.needs <= cpu_flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(variant_of.needs - cpu_flags()))}")
    load(variant_of)
    generator = torch.Generator().manual_seed(3)
    layer = quantise(Linear(torch.randn(96, 208, generator=generator) * torch.rand(96, 1, generator=generator)), form)
    assert layer.scales is not None
    rows = torch.randn(101, 208, generator=generator).to(dtype)
    packer = Packer(variant_of, 2)
    packed = packer.pack_bytes(layer.weight, layer.scales, dtype, rounded_rows=layer.rounded_rows)
    kernels = decoder(variant_of, 16, dtype)
    whole = kernels.multiply(rows, packed, 96)
    torch.testing.assert_close(whole, apply(layer, rows.float()), atol=2e-4 if form != "w8a8" else 2e-3, rtol=1e-5)
    for height in (*range(1, 41), 95, 96, 97):  # every tile, both sides of where panels are widened and of a block
        assert torch.equal(kernels.multiply(rows[:height], packed, 96), whole[:height])
