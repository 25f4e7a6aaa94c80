"""Which implementation of a kernel serves a device.

Owns: that choice and nothing else. A faster kernel is added here with the condition under which it wins.
"""

from __future__ import annotations

import torch

from .attention import TorchAttention

Attention = TorchAttention
"""What the engine calls: plan, write, attend. Other kernels keep this interface."""


def select_attention(
    head_dim: int, num_kv_heads: int, page_tokens: int, dtype: torch.dtype, device: torch.device
) -> Attention:
    return TorchAttention(head_dim, num_kv_heads, page_tokens, dtype, device)
