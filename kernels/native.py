"""The native CPU decoder as Python sees it: C records, and calls that let other threads run meanwhile.

Owns: loading the library, the mirror of its records (cpu/decoder.h, cpu/attention.h, cpu/packed.h), packing weights.
Must not: know checkpoints or configurations (engine/native_model.py fills the records), or be used from two threads.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_void_p

import numpy as np
import structlog
import torch
from torch.nn.functional import pad

from .cpu_build import CannotBuild, Variant, cpu_flags, library, usable_variants
from .plan import Span

__all__ = ["CannotBuild", "Layer", "Model", "NativeDecoder", "PackedWeight", "Packer", "aligned", "available", "load"]

PANEL = 32  # outputs that are packed together
PLAIN, INT8, FP8, BYTES = range(4)  # `Kind` of cpu/packed.h
LANES = 16  # sizes of vectors are multiples of this
ALIGNMENT = 64  # a vector that crosses a cache line costs two reads


log = structlog.get_logger(__name__)

Memory = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Packed(Structure):
    """`Packed` of cpu/packed.h."""

    _fields_ = (*[(name, c_void_p) for name in ("data", "scales", "offsets")], ("kind", c_int64))


class Layer(Structure):
    """`Layer` of cpu/decoder.h."""

    _fields_ = (
        *[(name, Packed) for name in ("qkv", "output", "gate_up", "down")],
        *[(name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")],
        *[(name, c_void_p) for name in ("qkv_bias", "output_bias", "gate_up_bias", "down_bias")],
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
    )


class Model(Structure):
    """`Model` of cpu/decoder.h."""

    _fields_ = (
        *[(name, c_int64) for name in ("hidden", "inner", "vocab", "page_tokens", "heads", "kv_heads", "head_dim")],
        ("num_layers", c_int64),
        ("norm_eps", c_float),
        ("rope_scale", c_float),
        ("frequencies", c_void_p),
        ("embedding", c_void_p),
        ("embedding_kind", c_int64),
        ("head", Packed),
        ("norm", c_void_p),
        ("layers", POINTER(Layer)),
    )


class _Span(Structure):
    _fields_ = (
        *[(name, c_int64) for name in ("first_row", "num_new", "num_context")],
        ("pages", c_void_p),
        ("sampled", c_int64),
    )


class _Batch(Structure):
    _fields_ = (("rows", c_int64), ("num_spans", c_int64), ("ids", c_void_p), ("spans", POINTER(_Span)))


def available() -> Variant:
    """The best instructions for the native decoder, built, checked and ready. Raises CannotBuild.

    What cannot be built or fails its own check here leaves its place to the next, and the log says so.
    """
    refused: dict[str, str] = {}
    for variant in usable_variants(cpu_flags()):
        try:
            load(variant)
        except CannotBuild as error:
            refused[variant.name] = str(error)
            continue
        for name, reason in refused.items():
            log.warning("native_variant_refused", variant=name, reason=reason, instead=variant.name)
        return variant
    raise CannotBuild("; ".join(dict.fromkeys(refused.values())))


@functools.cache
def load(variant: Variant) -> ctypes.CDLL:
    """The library of a variant, built and checked. Raises CannotBuild, also where it says that it must not be used."""
    try:
        lib = ctypes.CDLL(str(library(variant)))
    except OSError as error:
        raise CannotBuild(f"the native library cannot be loaded: {error}") from error
    lib.lw_refusal.argtypes, lib.lw_refusal.restype = (), c_char_p
    if (reason := lib.lw_refusal()) is not None:
        raise CannotBuild(f"{variant.name}: {reason.decode()}")
    lib.lw_open.argtypes, lib.lw_open.restype = (POINTER(Model), c_int, c_int), c_void_p
    lib.lw_close.argtypes, lib.lw_close.restype = (c_void_p,), None
    lib.lw_begin.argtypes, lib.lw_begin.restype = (c_void_p, POINTER(_Batch)), None
    lib.lw_layers.argtypes, lib.lw_layers.restype = (c_void_p, c_int64, c_int64), None
    lib.lw_logits.argtypes, lib.lw_logits.restype = (c_void_p, c_void_p), None
    lib.lw_multiply.argtypes = (c_void_p, c_void_p, c_int64, c_int64, POINTER(Packed), c_int64, c_void_p)
    lib.lw_multiply.restype = None
    lib.lw_attend.argtypes = (c_void_p, POINTER(_Batch), c_void_p, c_void_p, c_void_p, c_int64, c_void_p)
    lib.lw_attend.restype = None
    lib.lw_pack.argtypes, lib.lw_pack.restype = (c_void_p, c_int64, c_int64, c_void_p, c_int), None
    lib.lw_pack_bytes.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int)
    lib.lw_pack_bytes.restype = None
    return lib


def aligned(memory: Memory) -> Memory:
    """`memory` from its first aligned byte on; it may lose up to ALIGNMENT bytes."""
    return memory[-memory.ctypes.data % ALIGNMENT :]


class PackedWeight:
    """A weight as the kernels read it; `record` points into memory that lives as long as this object."""

    def __init__(self, record: Packed, data: torch.Tensor, *others: torch.Tensor) -> None:
        self.record = record
        self._memory = (data, *others)
        for name, tensor in zip(("data", "scales", "offsets"), self._memory, strict=False):
            setattr(record, name, tensor.data_ptr())


class Packer:
    """Memory for packed weights, in large pieces: those get huge pages, and a forward pass touches all of it."""

    PIECE_BYTES = 64 << 20

    def __init__(self, variant: Variant, threads: int) -> None:
        self._library = load(variant)
        self._threads = threads
        self._piece: Memory = np.empty(0, dtype=np.uint8)
        self._used = 0

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """Weight [out, in], fp32 or bf16, as panels [ceil(out / 32), units, 32] of 4 bytes; `in` fills whole units."""
        return PackedWeight(Packed(kind=PLAIN), self._pack_units(weight))

    def pack_bytes(
        self, weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, *, rounded_rows: bool = False
    ) -> PackedWeight:
        """Weight [out, in], int8 or e4m3, with fp32 scales [out], for activations of `dtype`.

        `rounded_rows`: activations will be rounded to bytes too; int8 alone, and `in` a multiple of 4.
        """
        kind = FP8 if weight.dtype == torch.float8_e4m3fn else BYTES if rounded_rows else INT8
        weight = weight.view(torch.int8)
        rows, columns = weight.shape
        missing = -rows % PANEL
        scales = pad(scales.float(), (0, missing))
        if kind == BYTES:
            offsets = pad(weight.sum(1, dtype=torch.int32) * 128, (0, missing))
            return PackedWeight(Packed(kind=kind), self._pack_units(weight), scales, offsets)
        packed = self._take((rows + missing) * columns)
        source, values = weight.contiguous(), 4 // dtype.itemsize
        self._library.lw_pack_bytes(source.data_ptr(), rows, columns, values, packed.data_ptr(), self._threads)
        return PackedWeight(Packed(kind=kind), packed, scales)

    def _pack_units(self, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape
        units, rest = divmod(columns * weight.dtype.itemsize, 4)
        if rest:
            raise ValueError(f"a row of {columns} {weight.dtype} is no multiple of 4 bytes")
        packed = self._take(-(-rows // PANEL) * units * PANEL * 4)
        source = weight.contiguous()
        self._library.lw_pack(source.data_ptr(), rows, units, packed.data_ptr(), self._threads)
        return packed

    def _take(self, num_bytes: int) -> torch.Tensor:
        if self._used + num_bytes > len(self._piece):
            self._piece = aligned(np.empty(max(num_bytes, self.PIECE_BYTES) + ALIGNMENT, dtype=np.uint8))
            self._used = 0
        start = self._used
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return torch.from_numpy(self._piece[start : start + num_bytes])


class NativeDecoder:
    """A forward pass over `model`, whose memory the caller keeps alive; owns its threads."""

    def __init__(self, variant: Variant, model: Model, half: bool, threads: int) -> None:
        self._library = load(variant)
        self._num_layers: int = model.num_layers
        self._vocab: int = model.vocab
        self._handle = c_void_p(self._library.lw_open(byref(model), int(half), threads))

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self._library.lw_close(handle)

    def begin(self, ids: Sequence[int], spans: Sequence[Span], sampled: Sequence[bool]) -> None:
        """Embeds `ids`, the new tokens of all spans one after the other; `sampled` says whose next token is wanted."""
        self._library.lw_begin(self._handle, byref(self._batch(ids, spans, sampled)))

    def _batch(self, ids: Sequence[int], spans: Sequence[Span], sampled: Sequence[bool]) -> _Batch:
        records = (_Span * len(spans))()
        kept = []  # what the records point to, until the pass is over
        row = 0
        for record, span, wanted in zip(records, spans, sampled, strict=True):
            pages = _table(span.pages)
            kept.append(pages)
            record.first_row, record.num_new, record.num_context = row, span.num_new, span.num_context
            record.pages, record.sampled = pages.buffer_info()[0], wanted
            row += span.num_new
        rows = array("q", ids)
        if row != len(rows):
            raise ValueError(f"{len(rows)} ids for {row} rows")
        self._kept = (kept, rows, records)
        return _Batch(row, len(spans), rows.buffer_info()[0], records)

    def layers(self, low: int, high: int) -> None:
        """Runs these layers; their KV is then in the pages."""
        self._library.lw_layers(self._handle, low, high)

    def logits(self, count: int) -> torch.Tensor:
        """[count, vocab] in fp32 for the sampled spans in their order."""
        out = torch.from_numpy(np.empty((count, self._vocab), dtype=np.float32))
        self._library.lw_logits(self._handle, out.data_ptr())
        return out

    def attend(
        self, spans: Sequence[Span], cache: torch.Tensor, query: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Attention alone, for tests and benchmarks: [rows, heads, dim] for such a query; new KV is in `cache`."""
        out = torch.empty_like(query)
        batch = self._batch([0] * len(query), spans, [True] * len(spans))
        keys, values = cache[0].data_ptr(), cache[1].data_ptr()
        self._library.lw_attend(self._handle, byref(batch), query.data_ptr(), keys, values, window or 0, out.data_ptr())
        return out

    def multiply(self, rows: torch.Tensor, packed: PackedWeight, columns: int) -> torch.Tensor:
        """rows [n, k] times a packed weight with `columns` outputs, in fp32; as `attend`."""
        out = torch.empty((len(rows), columns), dtype=torch.float32)
        self._library.lw_multiply(
            self._handle, rows.data_ptr(), rows.shape[1], len(rows), byref(packed.record), columns, out.data_ptr()
        )
        return out


def _table(pages: Sequence[int]) -> array[int]:
    """Page numbers as C reads them: no copy of what already is an array."""
    return pages if isinstance(pages, array) and pages.typecode == "i" else array("i", pages)
