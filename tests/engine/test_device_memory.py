"""KV from one pool to another as between two GPUs: real pools, real kernels in Triton's interpreter, a stand-in driver.

With a GPU (`-m gpu`) the same between two processes on it. The tests of what may go wrong on the way are
tests/transfer/test_ipc_link.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported and when a kernel is defined
pytest.importorskip("triton")

from lanewise.engine import device_memory, kv_pool
from lanewise.engine.device_memory import DeviceMemory
from lanewise.engine.kv_pool import KVPool
from lanewise.kernels import triton_pieces
from lanewise.kernels.cuda_ipc import Driver
from lanewise.policy.blocks import KVLayout
from lanewise.transfer import Committed, Delivered, Limits, Peer, Receiver, Sender, neighbour
from lanewise.transfer.ipc_link import checked, fitting
from lanewise.transfer.trial import References
from lanewise.transfer.word_sum import packed, word_sum
from tests.transfer.conftest import CACHE_KEY, Log, Net, endpoint, eventually
from tests.transfer.standin_gpu import allocate, build

CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="bfloat16", dtype_bytes=2)
ALL = range(LAYOUT.num_layers), range(LAYOUT.num_kv_heads)
KEY = ("r", 1)

pytestmark = pytest.mark.skipif(not neighbour.place(), reason="no process_vm_readv")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def make(library, monkeypatch):
    """Pools whose memory is shared as that of a GPU would be; the ways of a CPU's memory are closed to them."""
    monkeypatch.setenv("LANEWISE_STANDIN_OWN", "1")
    lock = threading.Lock()  # Triton's interpreter runs one kernel at a time in a process
    for name in ("copy", "checksum", "zero"):
        monkeypatch.setattr(device_memory.triton_pieces, name, _locked(lock, getattr(triton_pieces, name)))
    monkeypatch.setattr(neighbour, "is_own", lambda pid: False)
    monkeypatch.setattr(device_memory, "_block", lambda device: torch.from_numpy(allocate(library, 8192)))

    def zeros(shape, dtype, device):
        memory = allocate(library, int(np.prod(shape)) * dtype.itemsize)
        return torch.from_numpy(memory).view(dtype).view(shape)

    monkeypatch.setattr(kv_pool, "_zeros", zeros)

    def pool(num_pages: int, page_tokens: int) -> KVPool:
        made = KVPool(LAYOUT, num_pages, page_tokens, CPU)
        made._rows = made._flat = None
        made.device_memory = DeviceMemory(made, Driver(0, library))
        return made

    return pool


def _locked(lock, function):
    def run(*arguments):
        with lock:
            return function(*arguments)

    return run


def fill(pool: KVPool, seed: int) -> None:
    for index, layer in enumerate(pool.layers):
        generator = torch.Generator().manual_seed(seed * 100 + index)
        layer.copy_(torch.randn(layer.shape, generator=generator).to(layer.dtype))


def test_places_are_what_read_copies(make):
    pool = make(16, 16)
    fill(pool, 1)
    pages = [5, 6, 1, 9, 0]
    for tokens, layers in ((range(70), range(3)), (range(3, 17), range(1, 2)), (range(16, 32), range(3))):
        data = pool.read(pages, tokens, layers, range(2))
        areas = pool.places(pages, tokens, layers, range(2))
        assert b"".join(_bytes(areas)) == data.tobytes()
        assert packed(pool.device_memory.checksum(areas)) == word_sum(data.tobytes())
    assert pool.places(pages, range(4), range(3), range(1)) is None


def _bytes(areas: np.ndarray) -> list[bytes]:
    import ctypes

    return [ctypes.string_at(address, size) for address, size in areas.tolist()]


def test_a_pool_passes_the_test_of_its_device(make):
    memory = make(4, 16).device_memory
    assert checked(memory) is memory
    with pytest.raises(OSError, match="invalid resource handle"):
        memory.open(bytes(64))


def test_chunks_fit_what_a_message_can_name(make):
    pool = make(4, 16)
    limits = fitting(Limits(), pool)
    assert limits.referred_bytes == (1024 - 4 * LAYOUT.num_layers) * 16 * LAYOUT.slice_bytes(1, 1) // 2


def test_a_prompt_goes_from_pool_to_pool_by_reference(make):
    source, target = make(16, 16), make(8, 32)
    fill(source, 2)
    ids, pages, there = list(range(100)), [3, 4, 9, 0, 2, 7, 8], [5, 1, 2, 7]
    limits = Limits(chunk_bytes=4096, referred_bytes=4096)
    events, others = Log(), Log()
    here = endpoint(layout=LAYOUT)
    sender = Sender(here, source, events, limits=limits, references=References.ALWAYS)
    far = endpoint(layout=LAYOUT)
    receiver = Receiver(far, target, others, limits=limits)
    others.react = lambda event: type(event).__name__ == "Offered" and receiver.grant(event.key, there, 0)
    try:
        peer = Peer(receiver.start(), far.incarnation)
        sender.start()
        sender.connect(peer)
        outlets = sender._thread._ways.outlets
        eventually(lambda: (found := outlets.to(peer.kv_address)) and found.route == "reference", "references", 30)
        receiver.expect(KEY, ids, CACHE_KEY)
        sender.begin(KEY, peer, ids, CACHE_KEY, pages)
        sender.commit(KEY, Net.token(KEY))
        others.wait(Committed, KEY, 30)
        events.wait(Delivered, KEY, 30)
        seen = sender.snapshot()
    finally:
        sender.close()
        receiver.close()
    assert seen.chunks_referred == seen.chunks_sent - seen.chunks_resent > 1  # the interpreter is slow
    assert (target.read(there, range(100), *ALL) == source.read(pages, range(100), *ALL)).all()
    assert not target.layers[0][:, [0, 3, 4, 6]].any(), "something beside it was written"


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_prompt_goes_between_processes_on_a_gpu():
    device = torch.device("cuda", 0)
    pool = KVPool(LAYOUT, 1024, 16, device)
    for layer in pool.layers:
        layer.copy_(torch.randn(layer.shape, device=device))
    pool.share()
    assert checked(pool.device_memory) is not None
    script = Path(__file__).with_name("gpu_peer.py")
    words = [sys.executable, str(script), "far"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        events = Log()
        limits = Limits(chunk_bytes=65536)
        sender = Sender(endpoint(layout=LAYOUT), pool, events, limits=limits, references=References.ALWAYS)
        try:
            peer = Peer(process.stdout.readline().strip(), "far")
            sender.start()
            sender.connect(peer)
            outlets = sender._thread._ways.outlets
            eventually(lambda: (found := outlets.to(peer.kv_address)) and found.route == "reference", "references", 60)
            ids, pages = list(range(2000)), [*range(500, 560), *range(100, 30, -1)]
            sender.begin(KEY, peer, ids, CACHE_KEY, pages)
            sender.commit(KEY, Net.token(KEY))
            events.wait(Delivered, KEY, 30)
            seen = sender.snapshot()
            assert seen.chunks_referred == seen.chunks_sent > 1
            process.stdin.write("sum\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() == word_sum(pool.read(pages, range(2000), *ALL).tobytes()).hex()
        finally:
            sender.close()
            process.kill()
