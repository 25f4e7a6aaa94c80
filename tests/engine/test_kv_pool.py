"""The pool's tensors: the wire form between pools of different pages, and the size of the pool."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.engine.kv_pool import KVPool, pool_pages
from lanewise.errors import ConfigError
from lanewise.policy.blocks import KVLayout

CPU = torch.device("cpu")


def layout(dtype: str = "float32", dtype_bytes: int = 4) -> KVLayout:
    return KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype, dtype_bytes=dtype_bytes)


def filled(pool: KVPool, seed: int = 0) -> KVPool:
    generator = torch.Generator().manual_seed(seed)
    for layer in pool.layers:
        layer.copy_(torch.randn(layer.shape, generator=generator))
    return pool


@given(
    start=st.integers(0, 150),
    count=st.integers(1, 100),
    layers=st.sampled_from([range(3), range(1, 2), range(2, 3)]),
    heads=st.sampled_from([range(2), range(1), range(1, 2)]),
    dtype=st.sampled_from([("float32", 4), ("bfloat16", 2), ("float16", 2)]),
    order=st.permutations(range(16)),
    by_index=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_read_and_write_between_page_sizes(start, count, layers, heads, dtype, order, by_index):
    source = filled(KVPool(layout(*dtype), 16, 16, CPU))
    target = KVPool(layout(*dtype), 8, 32, CPU)
    if by_index:  # as in the memory of a GPU
        source._rows = target._rows = source._flat = target._flat = None
    tokens = range(start, start + count)
    here = list(order)
    there = [page for page in order if page < 8]
    data = source.read(here, tokens, layers, heads)
    assert data.nbytes == source.layout.slice_bytes(count, len(layers)) * len(heads) // 2
    target.write(there, tokens, layers, heads, memoryview(data))
    assert (target.read(there, tokens, layers, heads) == data).all()
    # Canonical: what the tensors say, token by token.
    raw = data.view(np.uint16 if dtype[1] == 2 else np.float32).reshape(len(layers), 2, count, len(heads), 8)
    for pool, pages, size in ((source, here, 16), (target, there, 32)):
        for index, layer in enumerate(layers):
            for offset in (0, count - 1):
                page, slot = divmod(start + offset, size)
                expected = pool.layers[layer][:, pages[page], slot, heads.start : heads.stop]
                expected = expected.view(torch.uint16) if dtype[1] == 2 else expected
                assert (raw[index, :, offset] == expected.numpy()).all()
    untouched = [layer for layer in range(3) if layer not in layers]
    assert all(not target.layers[layer].any() for layer in untouched)
    assert all(not layer[:, :, :, head].any() for layer in target.layers for head in {0, 1} - set(heads))


@given(
    start=st.integers(0, 150),
    count=st.integers(1, 100),
    layers=st.sampled_from([range(3), range(1, 2)]),
    order=st.permutations(range(16)),
)
@settings(max_examples=40, deadline=None)
def test_views_are_what_read_copies_and_can_be_filled(start, count, layers, order):
    source, target = filled(KVPool(layout(), 16, 16, CPU)), KVPool(layout(), 16, 16, CPU)
    tokens, pages = range(start, start + count), list(order)
    where = pages, tokens, layers, range(2)
    views = source.views(*where)
    data = source.read(*where)
    assert b"".join(views) == data.tobytes()
    for there, view in zip(target.views(*where), views, strict=True):
        there[:] = view
    assert (target.read(*where) == data).all()
    assert source.views(pages, tokens, layers, range(1)) is None  # a piece for each token
    written = sum(int(layer.count_nonzero()) for layer in target.layers)
    assert written == data.view(np.float32).nonzero()[0].size, "something beside it was written"


def test_what_lies_outside_the_pages_or_the_heads_is_refused():
    pool = KVPool(layout(), 4, 16, CPU)
    with pytest.raises(ValueError, match="does not lie in 2 pages"):
        pool.read([0, 1], range(33), range(1), range(2))
    for heads in (range(3), range(1, 1), range(-1, 1), range(0, 2, 2)):
        with pytest.raises(ValueError, match="does not lie in 2 heads"):
            pool.read([0, 1], range(3), range(1), heads)


SIZES = {"weight_bytes": 100_000, "workspace_bytes": 0, "sharing": 2, "useful_tokens": 10**9}


def test_pool_size():
    token = layout().bytes_per_token
    asked = pool_pages(layout(), 16, asked_bytes=100 * token, memory_bytes=0, **SIZES)
    assert asked == 6
    automatic = pool_pages(layout(), 16, asked_bytes=0, memory_bytes=1_000_000, **SIZES)
    assert automatic == (800_000 - 100_000) // 2 // (16 * token)
    capped = pool_pages(layout(), 16, asked_bytes=0, memory_bytes=10**9, **{**SIZES, "useful_tokens": 640})
    assert capped == 40
    with pytest.raises(ConfigError, match="too few for a KV pool"):
        pool_pages(layout(), 16, asked_bytes=0, memory_bytes=100_000, **SIZES)


def test_a_pool_of_little_more_than_one_request_says_no(small_engine, load, driver):
    """1.2 requests fit: the second is refused whole, and gets its pages when the first is gone."""
    from lanewise.request import Sampling

    tokens = 1000
    engine = load(small_engine.model_dir, kv_cache_bytes=int(1.2 * tokens) * small_engine.pool.layout.bytes_per_token)
    drive = driver()
    first, second = drive.open([[1] * tokens, [2] * tokens], Sampling(max_tokens=1))
    assert engine.pool.ensure(first, tokens)
    assert not engine.pool.ensure(second, tokens)
    assert len(second.pages) == 0
    engine.pool.release(first)
    assert engine.pool.ensure(second, tokens)
    engine.pool.release(second)


def test_populating_makes_memory_real_and_changes_none_of_it():
    pool = KVPool(KVLayout(3, 2, 64, "float32", 4), 8192, 16, torch.device("cpu"))
    pool.layers[1][0, 5] = 7.0
    before = resident_bytes()
    populating = pool.populate()
    assert populating is not None
    populating.join(60)
    grown = resident_bytes() - before
    whole = sum(layer.nbytes for layer in pool.layers)
    assert grown > 0.9 * whole  # but for the huge page that was written above
    assert all(
        float(layer.abs().sum()) == (7.0 * pool.layers[1][0, 5].numel() if i == 1 else 0)
        for i, layer in enumerate(pool.layers)
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
