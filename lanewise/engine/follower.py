"""A rank other than 0 of a tensor-parallel worker: `python -m lanewise.engine.follower BATCH_FD COPY_FD`.

Owns: its shard of the weights and of the KV; it computes what rank 0 sends and copies KV as rank 0 asks.
Must not: decide anything, or live longer than rank 0.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading

import msgspec
import torch

from lanewise.config import WorkerConfig
from lanewise.engine import weights
from lanewise.engine.assemble import open_model
from lanewise.engine.carried import Carried
from lanewise.engine.kv_pool import KVPool, layout_of
from lanewise.engine.parallel_model import ParallelDecoder, join, open_store, parallel_decoder
from lanewise.engine.pipe import Batch, Copy, Lost, Setup, receive, send
from lanewise.engine.shard import Shard
from lanewise.errors import ConfigError

_PR_SET_PDEATHSIG = 1
EXIT_USAGE = 2


def main(batch_fd: int, copy_fd: int) -> None:
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 drains first; the end of its sockets is ours
        signal.signal(number, signal.SIG_IGN)
    batches, copies = socket.socket(fileno=batch_fd), socket.socket(fileno=copy_fd)
    try:
        setup = msgspec.msgpack.decode(receive(batches), type=Setup)
        decoder, pool = _prepare(batches, setup)
        threading.Thread(target=_copies, args=(copies, pool), name="copies", daemon=True).start()
        while True:
            batch = msgspec.msgpack.decode(receive(batches), type=Batch)
            carried = Carried.elsewhere(batch.carried, pool.device) if batch.carried else None
            with torch.inference_mode():
                decoder.run(*batch.parts(), carried=carried)
    except Lost:
        os._exit(0)  # rank 0 is gone; what it began with us cannot end
    except ConfigError as error:
        print(f"lanewise: rank of a worker: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_USAGE)


@torch.inference_mode()
def _prepare(batches: socket.socket, setup: Setup) -> tuple[ParallelDecoder, KVPool]:
    config = WorkerConfig(**msgspec.json.decode(setup.config))
    shard = Shard(setup.rank, setup.size)
    opened = open_model(config)
    loaded = weights.load_weights(
        opened.checkpoint, opened.config, opened.dtype, opened.device, form=config.weights, shard=shard
    )
    send(batches, b"loaded")
    num_pages = msgspec.msgpack.decode(receive(batches), type=int)
    pool = KVPool(layout_of(shard.config(opened.config), opened.dtype), num_pages, config.page_tokens, opened.device)
    decoder = parallel_decoder(config.kernels, opened, loaded, pool, shard)
    join(shard, open_store(setup.size, setup.port), opened.device)
    send(batches, b"joined")
    return decoder, pool


def serve_copies(sock: socket.socket, pool: KVPool) -> None:
    """Reads and writes what rank 0 asks for. Raises Lost when it has gone."""
    while True:
        asked = msgspec.msgpack.decode(receive(sock), type=Copy)
        if asked.write:
            pool.write(*asked.ranges(), receive(sock))
            send(sock, b"written")
        else:
            send(sock, pool.read(*asked.ranges()).data)


def _copies(sock: socket.socket, pool: KVPool) -> None:
    try:
        serve_copies(sock, pool)
    except Lost:
        os._exit(0)


def _die_with_parent() -> None:
    """The kernel kills this process when the one that started it ends, even while both wait inside a sum."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
