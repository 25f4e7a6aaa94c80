"""Memory of the KV pool is made real before requests need it.

Owns: asking the kernel for pages of memory that was allocated and never written. Must not: change a byte of it.

A first write to memory costs a page fault, with huge pages one per 2 MiB, and a prompt's KV lies in as many places as
there are layers, twice. In a virtual machine whose memory the host has not given yet, one such fault was measured at 10
ms: the first write of a prompt's KV held a decode worker up for 60 to 240 ms. It happens here instead, in a thread of
the lowest priority beside the first requests.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator

import torch

_MADV_POPULATE_WRITE = 23  # Linux 5.14: fault in, writable, content untouched
STRIPE_BYTES = 2 << 20
MOST_BYTES = 1 << 30
"""Of a pool larger than this the rest is populated by use: it may never be needed, and others may need the memory."""


def in_background(areas: list[torch.Tensor]) -> threading.Thread:
    """Populates contiguous CPU tensors, a stripe of each in turn, from the start: the order in which they get used."""
    thread = threading.Thread(target=_populate, args=(areas,), name="populate", daemon=True)
    thread.start()
    return thread


def _populate(areas: list[torch.Tensor]) -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    for start, length in _stripes(areas):
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE):
            return  # an older kernel, or no memory left: use will populate it, or fail, where it needs it


def _stripes(areas: list[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of whole memory pages."""
    page, done = mmap.PAGESIZE, 0
    longest = max((area.nbytes for area in areas), default=0)
    for offset in range(0, longest, STRIPE_BYTES):
        for area in areas:
            low = -(-(area.data_ptr() + offset) // page) * page
            high = (area.data_ptr() + min(offset + STRIPE_BYTES, area.nbytes)) // page * page
            if low < high and done < MOST_BYTES:
                yield low, high - low
                done += high - low
