"""Products with int8 weights as a Triton kernel: the bytes are what is read, and widened on their way into the product.

Owns: the kernel and its launch. Must not: know layers; like triton_attention.py it is imported only where it is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS, DEPTH = 64, 64


@triton.jit(do_not_specialize=["count"])  # or the first batch of 1, and of 16, would wait for the compiler
def _bytes_kernel(
    rows, weight, scales, bias, out, count, outputs, size,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows and COLUMNS outputs; sums in fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < count, column < outputs
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, size, DEPTH):
        at = start + tl.arange(0, DEPTH)
        there = at < size
        left = tl.load(rows + row[:, None] * size + at[None, :], mask=in_rows[:, None] & there[None, :], other=0.0)
        bytes_ = tl.load(
            weight + column[:, None] * size + at[None, :], mask=in_columns[:, None] & there[None, :], other=0
        )
        total += tl.dot(left, tl.trans(bytes_.to(left.dtype)), input_precision="ieee")
    total = total * tl.load(scales + column, mask=in_columns, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    to = out + row[:, None] * outputs + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def bytes_product(
    rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """rows [n, in] @ (weight [out, in] int8 * scales [out]).T + bias, as [n, out] in the dtype of the rows."""
    count, size = rows.shape
    outputs = len(weight)
    out = torch.empty((count, outputs), dtype=rows.dtype, device=rows.device)
    height = 16 if count <= 16 else 64
    _bytes_kernel[triton.cdiv(count, height), triton.cdiv(outputs, COLUMNS)](
        rows.contiguous(), weight.contiguous(), scales, scales if bias is None else bias, out, count, outputs, size,
        HAS_BIAS=bias is not None, ROWS=height, COLUMNS=COLUMNS, DEPTH=DEPTH,
    )  # fmt: skip
    return out
