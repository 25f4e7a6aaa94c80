"""Compiles every Triton kernel for one GPU architecture, down to its machine code; no GPU is needed for that.

    python tests/kernels/compile_all.py [--architecture 90] [--dtype bf16 fp32]      # 90: H100 and H200

A process of its own, since a process that interprets kernels cannot compile them. The shapes are those of a model of 40
query and 8 key-value heads of 128. Says the machine code's size and shared memory of each, and what has failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lanewise.kernels import triton_attention, triton_bytes, triton_rows

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTEGERS = {"table": "*i32", "decode": "*i32", "tiles": "*i32", "slots": "*i64"}
FLOATS = {"scale": "fp32", "eps": "fp32", "partial": "*fp32", "summary": "*fp32", "scales": "*fp32"}
COUNTS = ("window", "num_splits", "table_stride", "size", "count", "outputs", "half_stride")


def kernels(dtype: str) -> list[tuple[Any, dict[str, Any]]]:
    """Each kernel with the constants it is launched with, in every form that is launched."""
    attention = triton_attention.TritonAttention(128, 8, 16, DTYPES[dtype], torch.device("cpu"))
    paged = {"HEADS": 40, "KV_HEADS": 8, "DIM": 128, "PAGE": 16, "BLOCK": attention.block_tokens}
    heads = {"HEADS": 40, "KV_HEADS": 8, "HALF": 64, "BLOCK": 64}
    product = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 64}
    return [
        (triton_attention._decode_kernel, {**paged, "ROWS": 16, "SPLIT": attention.split_tokens}),
        (triton_attention._combine_kernel, {"HEADS": 40, "DIM": 128, "SPLIT": attention.split_tokens}),
        (triton_attention._prompt_kernel, {**paged, "ROWS": attention.tile_rows}),
        *((triton_rows._norm_kernel, {"HAS_UPDATE": flag, "BLOCK": 8192}) for flag in (True, False)),
        *((triton_rows._heads_kernel, {**heads, "HAS_NORM": flag}) for flag in (True, False)),
        *((triton_rows._copy_kernel, {"TO_ROWS": flag, "BLOCK": 1024}) for flag in (True, False)),
        *((triton_bytes._bytes_kernel, {**product, "HAS_BIAS": flag}) for flag in (True, False)),
    ]


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in COUNTS:
            types[name] = "i32"
        elif name == "weight" and kernel is triton_bytes._bytes_kernel:
            types[name] = "*i8"
        else:
            types[name] = INTEGERS.get(name) or FLOATS.get(name) or f"*{dtype}"
    return types


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"])
    options = parser.parse_args()
    failed = 0
    for dtype in options.dtype:
        for kernel, constants in kernels(dtype):
            started = time.perf_counter()
            name = f"{kernel.__name__} {dtype} {constants}"
            types = signature(kernel, constants, dtype)
            aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
            try:
                source = ASTSource(kernel, types, constants, aligned)
                compiled = triton.compile(source, GPUTarget("cuda", options.architecture, 32))
            except Exception as error:
                failed += 1
                print(f"FAILED {name}: {type(error).__name__}: {error}")
                continue
            seconds = time.perf_counter() - started
            print(f"{name}: {len(compiled.asm['cubin'])} bytes, {compiled.metadata.shared} shared, {seconds:.2f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
