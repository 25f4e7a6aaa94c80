"""Device memory of other processes of this host: the three calls of the CUDA driver for it, and what they need.

Owns: their C signatures, and that the device's primary context, which torch uses too, is current while one runs. Must
not: keep account of what is open. Everything a driver refuses is an OSError with its words. **Not yet run on a GPU**:
written after the documentation of the driver's interface, and tested against a library that stands in for it.

The driver is asked and not torch: what torch shares between processes it also counts and frees, which is made for
tensors that come and go; a KV pool stays as long as its process.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

HANDLE_BYTES = 64
LIBRARY = "libcuda.so.1"
_LAZY_PEER_ACCESS = 1

_Address = ctypes.c_uint64  # CUdeviceptr, where pointers have 64 bits


class _Handle(ctypes.Structure):
    """CUipcMemHandle; the driver takes it by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


_P = ctypes.POINTER
_SIGNATURES = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorString": (ctypes.c_int, _P(ctypes.c_char_p)),
    "cuDeviceGet": (_P(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_P(ctypes.c_void_p), ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuCtxPopCurrent_v2": (_P(ctypes.c_void_p),),
    "cuMemGetAddressRange_v2": (_P(_Address), _P(ctypes.c_size_t), _Address),
    "cuIpcGetMemHandle": (_P(_Handle), _Address),
    "cuIpcOpenMemHandle_v2": (_P(_Address), _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_Address,),
}


class Driver:
    """Of one device; any thread."""

    def __init__(self, index: int, library: str = LIBRARY) -> None:
        """`index`: as torch counts devices."""
        self._library = ctypes.CDLL(library)
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise OSError(f"{library} has no {name}")
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def export(self, address: int) -> tuple[bytes, int]:
        """A handle of the allocation that this address lies in, and how far into it."""
        handle = _Handle()
        with self._current():
            base, _ = self._range(address)
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle), address - base

    def open(self, handle: bytes) -> tuple[int, int]:
        """Where another process's allocation now lies in this one, and its size; once at a time for each handle."""
        if len(handle) != HANDLE_BYTES:
            raise OSError(f"a handle of {len(handle)} bytes")
        address = _Address()
        with self._current():
            packed = _Handle.from_buffer_copy(handle)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), packed, _LAZY_PEER_ACCESS)
            try:
                base, size = self._range(address.value)
                if base != address.value:
                    raise OSError("what was opened is not the start of an allocation")
            except OSError:
                self._call("cuIpcCloseMemHandle", address)
                raise
        return base, size

    def close(self, address: int) -> None:
        """Nothing that was launched may still use it."""
        with self._current():
            self._call("cuIpcCloseMemHandle", address)

    def _range(self, address: int) -> tuple[int, int]:
        base, size = _Address(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        return base.value, size.value

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(words))
            raise OSError(f"{name}: {(words.value or b'').decode(errors='replace') or 'error'} ({code})")
