"""The native CPU kernels: every set of instructions, any number of threads, and a machine that cannot build them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lanewise.engine import native_model
from lanewise.engine.runner import Engine, Work
from lanewise.errors import ConfigError
from lanewise.kernels import cpu_build, native
from lanewise.kernels.cpu_build import VARIANTS, CannotBuild, Variant, cpu_flags, usable_variants
from lanewise.request import Sampling
from tests.engine.conftest import native_kernels
from tests.kernels.emulated import EMULATED

FIRST = Sampling(max_tokens=1, temperature=0.0, logprobs=512)
LENGTHS = (1, 70, 200)


def top_logprobs(engine: Engine, driver, chunk_tokens: int = 64) -> list[dict[int, float]]:
    """Log probabilities of the whole vocabulary after prompts that are computed together, in chunks."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in LENGTHS]
    seqs = driver().open(prompts, FIRST)
    found: dict[str, dict[int, float]] = {}
    while len(found) < len(seqs):
        work = [Work(seq, min(seq.num_uncomputed, chunk_tokens)) for seq in seqs if seq.key[0] not in found]
        for item in work:
            assert engine.pool.ensure(item.seq, len(item.seq.ids))
        for item, sampled in zip(work, engine.step(work), strict=True):
            if sampled is not None:
                found[item.seq.key[0]] = dict(sampled.top)
    for seq in seqs:
        engine.pool.release(seq)
    return [found[seq.key[0]] for seq in seqs]


def needs(variant: Variant) -> None:
    if not variant.needs <= cpu_flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(variant.needs - cpu_flags()))}")
    try:
        native.load(variant)
    except CannotBuild as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [*VARIANTS, EMULATED], ids=lambda variant: variant.name)
def test_every_set_of_instructions_agrees_with_torch(variant, dtype, build_model, load, driver, monkeypatch):
    needs(variant)
    # An odd inner size, and heads that are no multiple of a panel.
    directory, _ = build_model("qwen3", intermediate_size=88, head_dim=48, num_attention_heads=6)
    expected = top_logprobs(load(directory, dtype="float32", kernels="torch"), driver)
    monkeypatch.setattr(native_model, "available", lambda: variant)
    engine = load(directory, dtype=dtype)
    assert engine.kernels == f"native {variant.name}"
    for left, right in zip(top_logprobs(engine, driver), expected, strict=True):
        differences = torch.tensor([left[token] - right[token] for token in range(512)]).abs()
        assert differences.max() < (2e-4 if dtype == "float32" else 0.6)
        assert differences.mean() < (5e-5 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("variant", ["best", "emulated tiles"])
@pytest.mark.parametrize("family", ["qwen2-window", "llama3"])
def test_threads_and_chunks_change_no_bit(family, variant, build_model, load, driver, monkeypatch):
    if variant == "emulated tiles":
        needs(EMULATED)
        monkeypatch.setattr(native_model, "available", lambda: EMULATED)
    elif not native_kernels():
        pytest.skip("no native kernels on this machine")
    directory, _ = build_model(family)
    one = load(directory, dtype="bfloat16", threads=1)
    two = load(directory, dtype="bfloat16", threads=2, page_tokens=64)
    torch.set_num_threads(1)
    expected = top_logprobs(one, driver)
    assert top_logprobs(two, driver) == expected
    assert top_logprobs(two, driver, chunk_tokens=7) == expected


def test_without_a_compiler_torch_serves(build_model, load, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    directory, _ = build_model("qwen2")
    assert load(directory).kernels == "torch"
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        load(directory, kernels="native")


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CannotBuild, match=r"ended with 3: no such flag"):
        cpu_build.build(VARIANTS[-1], tmp_path)
    assert list(tmp_path.glob("*.so")) == []


def test_ready_made_libraries_need_no_compiler(monkeypatch, tmp_path):
    variant = VARIANTS[-1]
    ready = tmp_path / "ready"
    ready.mkdir()
    made = ready / cpu_build.file_name(variant)
    made.write_bytes(b"")
    monkeypatch.setenv("LANEWISE_NATIVE_DIR", str(ready))
    monkeypatch.setenv("PATH", "")
    assert cpu_build.library(variant) == made


def test_instructions_are_chosen_by_what_the_cpu_says(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nflags\t\t: fpu avx2 fma sse2\nflags\t\t: other\n")
    assert [variant.name for variant in usable_variants(cpu_flags(info))] == ["avx2"]
    with pytest.raises(CannotBuild, match="neither AVX2"):
        usable_variants(cpu_flags(Path(tmp_path / "missing")))


def test_the_best_instructions_can_be_forbidden(monkeypatch):
    everything = frozenset().union(*(variant.needs for variant in VARIANTS))
    assert usable_variants(everything) == VARIANTS
    monkeypatch.setenv("LANEWISE_NATIVE_AT_MOST", "avx512_bf16")
    assert [variant.name for variant in usable_variants(everything)] == ["avx512_bf16", "avx512", "avx2"]
    monkeypatch.setenv("LANEWISE_NATIVE_AT_MOST", "sse2")
    with pytest.raises(CannotBuild, match="'sse2', which is none of avx512_amx"):
        usable_variants(everything)
