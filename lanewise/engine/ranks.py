"""Rank 0's side of a tensor-parallel worker: starts the other ranks as processes, drives them, notices their end.

Owns: these processes and the sockets to them. Must not: outlive or be outlived by one: when a rank ends, so does the
worker (a supervisor starts it again), and when rank 0 ends, the others do (sockets close, the kernel kills).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import msgspec
import structlog
import torch
import torch.distributed as dist

from lanewise.config import WorkerConfig
from lanewise.engine import weights
from lanewise.engine.assemble import Opened, triton_attention
from lanewise.engine.carried import Carried
from lanewise.engine.kv_pool import KVPool, layout_of
from lanewise.engine.model import OnLayers
from lanewise.engine.parallel_model import ParallelDecoder, join, open_store, parallel_decoder
from lanewise.engine.parallel_pool import ParallelPool
from lanewise.engine.pipe import Batch, Setup, receive, send
from lanewise.engine.shard import Shard
from lanewise.errors import ConfigError
from lanewise.kernels.plan import Span

START_S = 1800.0  # for a follower to read its weights
ANSWER_S = 60.0
END_S = 10.0

log = structlog.get_logger(__name__)


class Ranks:
    """Ranks 1 to size - 1. `on_lost` is called once, on a thread of its own, with what happened."""

    def __init__(self, config: WorkerConfig, opened: Opened, on_lost: Callable[[str], None] | None = None) -> None:
        """Starts them; ConfigError where the model cannot be divided so. `lead` joins them."""
        self.size = config.tensor_parallel
        self._kernels = config.kernels
        _check(config, opened)
        self._copies: list[socket.socket] = []
        self._batches: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._on_lost = on_lost or _end_worker
        self._closing = threading.Event()
        self._store = open_store(self.size)
        try:
            for rank in range(1, self.size):
                self._start(_of_rank(config, opened, rank), rank)
        except BaseException:
            self.close()
            raise

    def _start(self, config: WorkerConfig, rank: int) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        theirs = [pair[1] for pair in pairs]
        numbers = [sock.fileno() for sock in theirs]
        command = [sys.executable, "-m", "lanewise.engine.follower", *map(str, numbers)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
        self._processes.append(subprocess.Popen(command, pass_fds=numbers, env=environment, stdin=subprocess.DEVNULL))
        for sock in theirs:
            sock.close()
        self._batches.append(pairs[0][0])
        self._copies.append(pairs[1][0])
        pairs[0][0].settimeout(START_S)
        pairs[1][0].settimeout(ANSWER_S)
        send(pairs[0][0], msgspec.msgpack.encode(Setup(config.model_dump_json(), rank, self.size, self._store.port)))

    def lead(
        self, opened: Opened, loaded: weights.Weights, num_pages: int, page_tokens: int
    ) -> tuple[KVPool, LeadingDecoder]:
        """Pool and decoder of the worker, once all ranks have read their weights and joined. Raises Lost."""
        for sock in self._batches:
            receive(sock)
        for sock in self._batches:
            send(sock, msgspec.msgpack.encode(num_pages))
        join(Shard(0, self.size), self._store, opened.device)
        for sock in self._batches:
            receive(sock)
            sock.settimeout(ANSWER_S)
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True).start()
        own, whole = (
            layout_of(model, opened.dtype) for model in (Shard(0, self.size).config(opened.config), opened.config)
        )
        pool = ParallelPool(own, whole, num_pages, page_tokens, opened.device, self._copies)
        return pool, LeadingDecoder(parallel_decoder(self._kernels, opened, loaded, pool, Shard(0, self.size)), self)

    def run(self, batch: Batch) -> None:
        """All followers begin this pass; they take part in its sums."""
        data = msgspec.msgpack.encode(batch)
        for sock in self._batches:
            send(sock, data)

    def close(self) -> None:
        """Ends all of them; for a worker that goes on living, as in tests."""
        self._closing.set()
        for sock in (*self._batches, *self._copies):
            sock.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(END_S)
        if dist.is_initialized():
            dist.destroy_process_group()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._closing.is_set():
            self._closing.set()
            self._on_lost(f"rank {rank} of {self.size} ended with status {status}")


class LeadingDecoder:
    """Rank 0's: what it computes, all ranks compute."""

    def __init__(self, decoder: ParallelDecoder, ranks: Ranks) -> None:
        self.kernels = decoder.kernels
        self._decoder = decoder
        self._ranks = ranks

    def run(
        self,
        spans: Sequence[Span],
        ids: Sequence[Sequence[int]],
        sampled: Sequence[bool],
        on_layers: OnLayers | None = None,
        carried: Carried | None = None,
    ) -> torch.Tensor | None:
        self._ranks.run(Batch.of(spans, ids, sampled, carried.places if carried is not None else ()))
        return self._decoder.run(spans, ids, sampled, on_layers, carried)


def share(config: WorkerConfig, rank: int) -> WorkerConfig:
    """The cores and threads that one rank takes of its worker's."""
    size = config.tensor_parallel
    if size == 1:
        return config
    cores = config.cores[rank::size] or config.cores[:1]
    threads = max(1, (config.threads or len(config.cores) or len(os.sched_getaffinity(0))) // size)
    return config.model_copy(update={"cores": cores, "threads": threads})


def _of_rank(config: WorkerConfig, opened: Opened, rank: int) -> WorkerConfig:
    """What a follower is configured with: its share, its device, the model as rank 0 found it."""
    device = f"cuda:{(opened.device.index or 0) + rank}" if opened.device.type == "cuda" else "cpu"
    dtype = str(opened.dtype).removeprefix("torch.")
    found = {"model": str(opened.directory), "dtype": dtype, "device": device}
    return share(config, rank).model_copy(update=found)


def _check(config: WorkerConfig, opened: Opened) -> None:
    shard = Shard(0, config.tensor_parallel).config(opened.config)
    if config.kernels == "native":
        raise ConfigError("kernels: native serves one rank; with tensor_parallel use auto, torch or triton")
    if config.kernels == "triton":
        triton_attention(shard, config.page_tokens, opened.dtype, opened.device)
        if opened.device.type == "cuda" and config.graph_capture_s:
            log.warning("graphs_not_captured", reason="tensor_parallel: sums over ranks have not been run in a graph")


def _end_worker(reason: str) -> None:
    log.error("rank_lost", reason=reason)
    os._exit(1)  # whoever waits for that rank would wait for ever
