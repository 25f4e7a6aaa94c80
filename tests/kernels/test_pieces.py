"""Copies, checksums and zeros of pieces of memory named by address, in Triton's interpreter; and that they compile."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported and when a kernel is defined
pytest.importorskip("triton")

from lanewise.kernels import triton_pieces as pieces
from lanewise.transfer.word_sum import packed, word_sum

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory(num_bytes: int, seed: int | None = 0) -> torch.Tensor:
    data = np.zeros(num_bytes, np.uint8) if seed is None else np.random.default_rng(seed).bytes(num_bytes)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(DEVICE)


def cut(whole: torch.Tensor, sizes: list[int], order: list[int] | None = None) -> np.ndarray:
    """Pieces of these sizes, laid out one after the other in memory, named in this order."""
    starts = np.cumsum([0, *sizes])
    assert starts[-1] <= len(whole)
    return np.array([(whole.data_ptr() + starts[i], sizes[i]) for i in order or range(len(sizes))], np.uint64)


def read(whole: torch.Tensor, areas: np.ndarray) -> bytes:
    data, base = bytes(whole.cpu().numpy()), whole.data_ptr()
    return b"".join(data[at - base : at - base + size] for at, size in areas.tolist())


SIZES = [4, 8192, 12, 4096, 5000, 4]


@pytest.mark.parametrize("order", [None, [5, 1, 0, 3, 2, 4]])
def test_the_checksum_is_that_of_the_host(order):
    whole = memory(sum(SIZES))
    areas = cut(whole, SIZES, order)
    assert packed(pieces.checksum(areas, DEVICE)) == word_sum(read(whole, areas))
    assert packed(pieces.checksum(areas[:1], DEVICE)) != packed(pieces.checksum(areas, DEVICE))


@pytest.mark.parametrize("there", [[sum(SIZES)], [4] * 30 + [sum(SIZES) - 120], list(reversed(SIZES))])
def test_copies_may_be_cut_differently_on_both_sides(there):
    whole, other = memory(sum(SIZES) + 64), memory(sum(SIZES) + 64, None)
    source = cut(whole, SIZES, [5, 1, 0, 3, 2, 4])
    order = list(range(len(there)))[::-1]
    target = cut(other, there, order)
    pieces.copy(source, target, DEVICE)
    assert read(other, target) == read(whole, source)
    assert not other[sum(SIZES) :].any(), "something beside it was written"
    pieces.zero(target[:1], DEVICE)
    assert not any(read(other, target[:1]))
    assert read(other, target[1:]) == read(whole, source)[int(target[0, 1]) :]


def test_what_are_no_words_or_do_not_fit_is_refused():
    whole = memory(64)
    at = whole.data_ptr()
    for areas in ([(at, 6)], [(at + 2, 4)], [(at, 0)]):
        with pytest.raises(ValueError, match="whole words"):
            pieces.checksum(np.array(areas, np.uint64), DEVICE)
    with pytest.raises(ValueError, match="do not fill"):
        pieces.copy(cut(whole, [8]), cut(whole, [12]), DEVICE)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lanewise.kernels import triton_pieces as pieces
for kernel in (pieces._copy_kernel, pieces._sum_kernel, pieces._zero_kernel):
    signature = {name: "constexpr" if name == "BLOCK" else "*i64" for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": pieces.BLOCK})
    for capability in (80, 90):
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """As far as a machine without one can tell."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_pieces.py"  # a kernel's source must be in a file
    script.write_text(COMPILE)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env=environment | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    if "ptxas" in found.stderr and "not found" in found.stderr.lower():
        pytest.skip("this Triton brings no assembler for GPUs")
    assert found.returncode == 0, found.stderr
