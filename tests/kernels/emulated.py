"""The kernels of avx512_amx as any machine can run them: tile instructions by the manual, not by the processor."""

from __future__ import annotations

from lanewise.kernels.cpu_build import VARIANTS, Variant, cpu_flags

AMX = next(variant for variant in VARIANTS if "amx_tile" in variant.needs)
_PLAIN = next((v for v in VARIANTS if v is not AMX and v.needs <= cpu_flags()), VARIANTS[-1])
_FLAGS = ("-fvisibility=hidden", "-DLANEWISE_EMULATE_TILES", "-O1")  # -O3 would take longer than the tests do
EMULATED = Variant("emulated_amx", _PLAIN.needs, (*_PLAIN.flags, *_FLAGS))
