"""The decoder of one rank through the Triton kernels: what is fused stays so, and each sum is one more call between.

Owns: nothing of its own. Must not: be imported without need (Triton decides at import how it runs), or be captured: no
sum over ranks inside a CUDA graph has been run yet, so ranks are launched as they come.
"""

from __future__ import annotations

from lanewise.engine.parallel_model import ParallelDecoder
from lanewise.engine.triton_model import TritonDecoder


class ParallelTritonDecoder(ParallelDecoder, TritonDecoder):
    """`ParallelDecoder` says where ranks meet, `TritonDecoder` what is computed between."""
