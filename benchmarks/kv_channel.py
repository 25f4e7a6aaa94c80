"""How fast the KV channel moves KV, against pyzmq alone: zero-copy send, one copy on arrival, same run, same machine.

    python benchmarks/kv_channel.py [--mib 128] [--rounds 5] [--stripes 1] [--chunk-kib 1024] [--json]

Sender and receiver are two processes. Rounds of both take turns, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import queue
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from lanewise.policy.blocks import KVLayout
from lanewise.request import Token
from lanewise.transfer import (
    Committed,
    Delivered,
    Endpoint,
    Limits,
    LinkReport,
    Offered,
    Peer,
    Receiver,
    Sender,
)

LAYOUT = KVLayout(num_layers=28, num_kv_heads=4, head_dim=128, dtype="bfloat16", dtype_bytes=2)  # Qwen2.5-7B
PAGE_TOKENS = 16
CACHE_KEY = b"k" * 32
ROW = LAYOUT.num_kv_heads * LAYOUT.head_dim * LAYOUT.dtype_bytes


class PagePool:
    """[layer][K|V][page][token][head and dim], copied page by page."""

    layout = LAYOUT

    def __init__(self, tokens: int) -> None:
        self.num_pages = -(-tokens // PAGE_TOKENS)
        self.pool = np.zeros((LAYOUT.num_layers, 2, self.num_pages, PAGE_TOKENS, ROW), np.uint8)

    def read(self, pages: list[int], tokens: range, layers: range) -> np.ndarray:
        first, last = tokens.start // PAGE_TOKENS, -(-tokens.stop // PAGE_TOKENS)
        out = np.empty((len(layers), 2, last - first, PAGE_TOKENS, ROW), np.uint8)
        for index, layer in enumerate(layers):
            np.take(self.pool[layer], pages[first:last], axis=1, out=out[index], mode="clip")
        skip = tokens.start - first * PAGE_TOKENS
        flat = out.reshape(len(layers), 2, -1, ROW)[:, :, skip : skip + len(tokens)]
        return np.ascontiguousarray(flat).reshape(-1)

    def write(self, pages: list[int], tokens: range, layers: range, data: memoryview) -> None:
        block = np.frombuffer(data, np.uint8).reshape(len(layers), 2, len(tokens), ROW)
        index = np.arange(tokens.start, tokens.stop)
        if tokens.start % PAGE_TOKENS == 0 and len(tokens) % PAGE_TOKENS == 0:
            first, last = tokens.start // PAGE_TOKENS, tokens.stop // PAGE_TOKENS
            whole = block.reshape(len(layers), 2, last - first, PAGE_TOKENS, ROW)
            self.pool[layers.start : layers.stop][:, :, pages[first:last]] = whole
            return
        page, slot = np.asarray(pages)[index // PAGE_TOKENS], index % PAGE_TOKENS
        self.pool[layers.start : layers.stop][:, :, page, slot] = block


def decode_process(pipe: Connection, tokens: int, chunk_bytes: int) -> None:
    """The receiving end of both contestants."""
    pool = PagePool(tokens)
    pages = list(range(pool.num_pages))
    receiver: Receiver | None = None

    def react(event: Any) -> None:
        assert receiver is not None
        if isinstance(event, Offered):
            receiver.grant(event.key, pages, 0)
        elif isinstance(event, Committed):
            pipe.send(event.key)

    receiver = Receiver(Endpoint("decode", "f", {}, LAYOUT), pool, react)
    context = zmq.Context()
    plain = context.socket(zmq.ROUTER)
    plain.setsockopt(zmq.RCVHWM, 8)
    port = plain.bind_to_random_port("tcp://127.0.0.1")
    pipe.send((receiver.start(), f"tcp://127.0.0.1:{port}"))
    target = pool.pool.reshape(-1)
    while (order := pipe.recv()) is not None:
        what, argument = order
        if what == "cpu":
            pipe.send(time.process_time())
            continue
        if what == "expect":
            receiver.expect(argument, list(range(tokens)), CACHE_KEY)
            pipe.send("expected")
            continue
        for at in range(0, argument, chunk_bytes):
            name = plain.recv()
            frame = plain.recv(copy=False)
            target[at : at + len(frame.buffer)] = np.frombuffer(frame.buffer, np.uint8)
        plain.send_multipart([name, b"done"])
    receiver.close()
    context.destroy(linger=0)


def channel_round(sender: Sender, events: queue.Queue[Any], pipe: Connection, peer: Peer, tokens: int, n: int) -> float:
    key = (f"r{n}", 1)
    pipe.send(("expect", key))
    pipe.recv()
    start = time.perf_counter()
    sender.begin(key, peer, list(range(tokens)), CACHE_KEY, list(range(-(-tokens // PAGE_TOKENS))))
    sender.commit(key, Token(*key, 0, 1))
    while True:
        event = events.get(timeout=60)
        if isinstance(event, Delivered):
            break
        assert type(event).__name__ not in ("Aborted", "Busy"), event
    taken = time.perf_counter() - start
    assert pipe.recv() == key
    return taken


def plain_round(sock: zmq.Socket[bytes], pipe: Connection, source: np.ndarray, chunk_bytes: int) -> float:
    """The same bytes between the same memories, in pool order, unchecked."""
    pipe.send(("plain", len(source)))
    start = time.perf_counter()
    for at in range(0, len(source), chunk_bytes):
        sock.send(source[at : at + chunk_bytes].data, copy=False)
    sock.recv()
    return time.perf_counter() - start


def cpu_seconds(pipe: Connection) -> float:
    """Of both processes so far: unlike the rate, it hardly depends on what else the machine does."""
    pipe.send(("cpu", None))
    return time.process_time() + float(pipe.recv())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="KV moved in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stripes", type=int, default=1)
    parser.add_argument("--chunk-kib", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokens = args.mib * 2**20 // LAYOUT.bytes_per_token
    total, chunk = tokens * LAYOUT.bytes_per_token, args.chunk_kib * 1024
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=decode_process, args=(theirs, tokens, chunk))
    process.start()
    address, plain_address = ours.recv()
    events: queue.Queue[Any] = queue.Queue()
    pool = PagePool(tokens)
    pool.pool[:] = np.random.default_rng(0).integers(0, 256, pool.pool.shape, np.uint8)
    limits = Limits(chunk_bytes=chunk, stripes=args.stripes)
    sender = Sender(Endpoint("prefill", "f", {}, LAYOUT), pool, events.put, limits=limits)
    sender.start()
    peer = Peer(address, "decode")
    sender.connect(peer)
    report = events.get(timeout=10)
    assert isinstance(report, LinkReport)
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.SNDHWM, 8)
    sock.connect(plain_address)
    rates: dict[str, list[float]] = {"lanewise": [], "pyzmq": []}
    cpu = {"lanewise": 0.0, "pyzmq": 0.0}
    for n in range(args.rounds + 1):
        before = cpu_seconds(ours)
        channel = total / channel_round(sender, events, ours, peer, tokens, n) / 1e9
        between = cpu_seconds(ours)
        alone = total / plain_round(sock, ours, pool.pool.reshape(-1)[:total], chunk) / 1e9
        if n:  # the first round warms up
            rates["lanewise"].append(channel)
            rates["pyzmq"].append(alone)
            cpu["lanewise"] += (between - before) / (total * args.rounds / 1e9)
            cpu["pyzmq"] += (cpu_seconds(ours) - between) / (total * args.rounds / 1e9)
    ours.send(None)
    process.join(10)
    sender.close()
    context.destroy(linger=0)
    show(args, tokens, report, rates, cpu)


def show(
    args: argparse.Namespace, tokens: int, report: LinkReport, rates: dict[str, list[float]], cpu: dict[str, float]
) -> None:
    rows = {
        name: {
            "median": statistics.median(v),
            "min": min(v),
            "max": max(v),
            "rounds": len(v),
            "cpu_s_per_gb": cpu[name],
        }
        for name, v in rates.items()
    }
    ratio = rows["lanewise"]["median"] / rows["pyzmq"]["median"]
    link = report.link
    if args.json:
        probe = {"latency_us": link.latency_s * 1e6, "gb_per_s": link.bandwidth_bytes_per_s / 1e9}
        print(json.dumps({"gb_per_s": rows, "ratio": ratio, "tokens": tokens, "link_test": probe}))
        return
    per_token = LAYOUT.bytes_per_token // 1024
    print(f"{tokens} tokens of {per_token} KiB, {args.stripes} stripe(s), {args.chunk_kib} KiB chunks")
    print(f"{'GB/s':<34}{'median':>8}{'min':>8}{'max':>8}{'CPU s/GB':>10}")
    names = {"lanewise": "KV channel (gather, verify, scatter)", "pyzmq": "pyzmq zero-copy + one copy"}
    for name, row in rows.items():
        print(f"{names[name]:<34}{row['median']:>8.2f}{row['min']:>8.2f}{row['max']:>8.2f}{row['cpu_s_per_gb']:>10.2f}")
    print(f"ratio {ratio:.2f}; link test: {link.latency_s * 1e6:.0f} us, {link.bandwidth_bytes_per_s / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
