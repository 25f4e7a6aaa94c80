"""How fast the KV channel moves KV, against pyzmq alone: zero-copy send, one copy on arrival, same run, same machine.

    python benchmarks/kv_channel.py [--mib 16 1] [--rounds 15] [--flight 8] [--stripes 1] [--chunk-kib 4096]
                                    [--channel Auto Direct ZeroMQ] [--json]

Sender and receiver are two processes with the pool of a real worker. A round moves 512 MiB in transfers of the given
size, so many in flight until the last ones; pyzmq moves as many bytes from and into as much memory, in messages as long
as a chunk. Rounds of both take turns, so that whatever else the machine does hits both, and the ratio is the median
over such pairs. A transfer that has ended is followed by the next from the channel's own thread, as pyzmq's messages
follow each other, so that no thread of the benchmark stands between them. Several channels take turns in one run:
`Auto` as of the workers, which here means that the receiver reads the sender's memory, `Direct`, the same without that,
and `ZeroMQ`.
Transfers of 64 KiB are reported as latency: from `begin` to Delivered, one at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import queue
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import zmq

from lanewise.engine.kv_pool import KVPool
from lanewise.fleet import Link, LinkState
from lanewise.policy.blocks import KVLayout
from lanewise.request import Token
from lanewise.rpc.process import settle_collector
from lanewise.transfer import (
    Aborted,
    Busy,
    Delivered,
    Endpoint,
    Limits,
    LinkReport,
    Offered,
    Peer,
    Receiver,
    Sender,
)
from lanewise.transfer.trial import References

LAYOUT = KVLayout(num_layers=28, num_kv_heads=4, head_dim=128, dtype="bfloat16", dtype_bytes=2)  # Qwen2.5-7B
PAGE_TOKENS = 16
ROUND_BYTES = 512 * 2**20
CACHE_KEY = b"k" * 32


def make_pool(tokens: int, flight: int) -> KVPool:
    """The pool of a worker on a CPU, with pages for so many prompts of so many tokens."""
    return KVPool(LAYOUT, num_pages(tokens) * flight, PAGE_TOKENS, torch.device("cpu"))


def num_pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def slot_pages(key: tuple[str, int], flight: int, per: int) -> list[int]:
    """The pages of a transfer: those of the last one in its slot, which has ended."""
    slot = int(key[0].rpartition("/")[2]) % flight
    return list(range(slot * per, (slot + 1) * per))


def pieces(region: int, total: int, piece: int) -> Iterator[tuple[int, int]]:
    """(start, end) in a region that is gone through again and again until so many bytes have passed."""
    done = 0
    while done < total:
        start = done % region
        length = min(piece, region - start, total - done)
        yield start, start + length
        done += length


def decode_process(pipe: Connection, tokens: int, flight: int, chunk_bytes: int, direct: bool) -> None:
    """The receiving end of both contestants. Each transfer in flight has pages of its own."""
    pool = make_pool(tokens, flight)
    per = num_pages(tokens)
    receiver: Receiver | None = None

    def react(event: Any) -> None:
        assert receiver is not None
        if isinstance(event, Offered):
            receiver.grant(event.key, slot_pages(event.key, flight, per), 0)
        elif isinstance(event, Aborted):
            pipe.send(event.reason)

    for layer in pool.layers:
        layer.fill_(1)  # memory that is there: neither contestant pays for faulting it in
    settle_collector()
    receiver = Receiver(Endpoint("decode", "f", {}, LAYOUT), pool, react, direct=direct)
    context = zmq.Context()
    plain = context.socket(zmq.ROUTER)
    plain.setsockopt(zmq.RCVHWM, 8)
    port = plain.bind_to_random_port("tcp://127.0.0.1")
    pipe.send((receiver.start(), f"tcp://127.0.0.1:{port}"))
    target = np.ones(flight * LAYOUT.slice_bytes(tokens, LAYOUT.num_layers), np.uint8)
    while (order := pipe.recv()) is not None:
        what, argument = order
        if what == "cpu":
            pipe.send(time.process_time())
            continue
        if what == "expect":
            for key in argument:
                receiver.expect(key, list(range(tokens)), CACHE_KEY)
            pipe.send("expected")
            continue
        for start, end in pieces(len(target), argument, chunk_bytes):
            name = plain.recv()
            target[start:end] = np.frombuffer(plain.recv(copy=False).buffer, np.uint8)
        plain.send_multipart([name, b"done"])
    receiver.close()
    context.destroy(linger=0)


def plain_round(
    sock: zmq.Socket[bytes], pipe: Connection, source: np.ndarray, num_bytes: int, chunk_bytes: int
) -> float:
    """As many bytes between memories of the same size, in pool order, unchecked."""
    pipe.send(("plain", num_bytes))
    begun = time.perf_counter()
    for start, end in pieces(len(source), num_bytes, chunk_bytes):
        sock.send(source[start:end].data, copy=False)
    sock.recv()
    return time.perf_counter() - begun


def cpu_seconds(pipe: Connection) -> float:
    """Of both processes so far: unlike the rate, it hardly depends on what else the machine does."""
    pipe.send(("cpu", None))
    return time.process_time() + float(pipe.recv())


class Contest:
    def __init__(self, tokens: int, flight: int, channel: str, args: argparse.Namespace) -> None:
        size, chunk = LAYOUT.slice_bytes(tokens, LAYOUT.num_layers), args.chunk_kib * 1024
        self.tokens, self.flight, self.chunk = tokens, flight, min(chunk, size)
        direct = channel != "ZeroMQ"
        self.pipe, theirs = mp.get_context("spawn").Pipe()
        facts = (theirs, tokens, flight, self.chunk, direct)
        self.process = mp.get_context("spawn").Process(target=decode_process, args=facts)
        self.process.start()
        address, plain_address = self.pipe.recv()
        self.events: queue.Queue[Any] = queue.Queue()
        pool = make_pool(tokens, flight)
        for layer in pool.layers:
            layer.fill_(2)
        self.source = np.full(flight * size, 2, np.uint8)
        limits = Limits(chunk_bytes=chunk, stripes=args.stripes)
        self.link: Link | None = None
        references = References.AUTO if channel == "Auto" else References.NEVER
        self.sender = Sender(
            Endpoint("prefill", "f", {}, LAYOUT),
            pool,
            self.react,
            limits=limits,
            direct=direct,
            references=references,
        )
        self.sender.start()
        self.peer = Peer(address, "decode")
        self.sender.connect(self.peer)
        time.sleep(2.0)  # tests of the link
        assert self.link is not None
        assert self.link.state is LinkState.VERIFIED, self.link
        settle_collector()  # as workers do
        self.context = zmq.Context()
        self.sock = self.context.socket(zmq.DEALER)
        self.sock.setsockopt(zmq.SNDHWM, 8)
        self.sock.connect(plain_address)
        self.rounds = 0
        self.count = self.delivered = 0  # transfers of this round
        self.ids = list(range(tokens))

    def react(self, event: Any) -> None:
        if isinstance(event, Delivered):
            self.delivered += 1
            name, _, index = event.key[0].rpartition("/")
            if int(index) + self.flight < self.count:
                self.begin((f"{name}/{int(index) + self.flight}", 1))
            if self.delivered == self.count:
                self.events.put(event)
        elif isinstance(event, LinkReport):
            self.link = event.link
        elif isinstance(event, Aborted | Busy):
            self.events.put(event)

    def begin(self, key: tuple[str, int]) -> None:
        self.sender.begin(key, self.peer, self.ids, CACHE_KEY, slot_pages(key, self.flight, num_pages(self.tokens)))
        self.sender.commit(key, Token(*key, 0, 1))

    def channel(self, count: int) -> float:
        """Seconds for `count` transfers, `flight` of them at a time."""
        self.rounds += 1
        self.count, self.delivered = count, 0
        keys = [(f"r{self.rounds}/{index}", 1) for index in range(count)]
        self.pipe.send(("expect", keys))
        self.pipe.recv()
        start = time.perf_counter()
        for key in keys[: self.flight]:
            self.begin(key)
        end = self.events.get(timeout=60)
        assert isinstance(end, Delivered), end
        return time.perf_counter() - start

    def plain(self, nbytes: int) -> float:
        return plain_round(self.sock, self.pipe, self.source, nbytes, self.chunk)

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(10)
        self.sender.close()
        self.context.destroy(linger=0)


def measure(mib: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates of the channels and of pyzmq, and their CPU time, which hardly depends on what else the machine does."""
    tokens = int(mib * 2**20) // LAYOUT.bytes_per_token
    size = tokens * LAYOUT.bytes_per_token
    count = max(args.flight, ROUND_BYTES // size)
    total = count * size
    contests = {channel: Contest(tokens, args.flight, channel, args) for channel in args.channel}
    names = [*args.channel, "pyzmq"]
    rates: dict[str, list[float]] = {name: [] for name in names}
    cpu = dict.fromkeys(names, 0.0)
    plain = contests[args.channel[0]]
    for n in range(args.rounds + 1):
        for name in names:
            contest = contests.get(name, plain)
            before = cpu_seconds(contest.pipe)
            taken = contest.channel(count) if name in contests else contest.plain(total)
            if n:  # the first round warms up
                rates[name].append(total / taken / 1e9)
                cpu[name] += (cpu_seconds(contest.pipe) - before) / (total * args.rounds / 1e9)
    rows = []
    for name, contest in contests.items():
        contest.close()
        assert contest.link is not None
        pairs = zip(rates[name], rates["pyzmq"], strict=True)
        ways = {"channel": name, "pyzmq": "pyzmq"}
        rows.append(
            {
                "mib": mib,
                "channel": name,
                "gb_per_s": {
                    what: {"median": statistics.median(v := rates[way]), "min": min(v), "max": max(v)}
                    for what, way in ways.items()
                },
                "cpu_s_per_gb": {what: cpu[way] for what, way in ways.items()},
                "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
                "link": {
                    "latency_us": contest.link.latency_s * 1e6,
                    "gb_per_s": contest.link.bandwidth_bytes_per_s / 1e9,
                },
            }
        )
    return rows


def latency_us(channel: str, args: argparse.Namespace, kib: int = 64) -> dict[str, float]:
    tokens = -(-kib * 1024 // LAYOUT.bytes_per_token)
    contest = Contest(tokens, 1, channel, args)
    taken = sorted(contest.channel(1) * 1e6 for _ in range(200))
    contest.close()
    return {"p50": taken[100], "p99": taken[198]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+", default=[16, 1], help="KV of one transfer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flight", type=int, default=8, help="transfers under way at a time")
    parser.add_argument("--stripes", type=int, default=1)
    parser.add_argument("--chunk-kib", type=int, default=Limits().chunk_bytes // 1024)
    parser.add_argument("--channel", choices=["Auto", "Direct", "ZeroMQ"], nargs="+", default=["Auto"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [row for mib in args.mib for row in measure(mib, args)]
    taken = {channel: latency_us(channel, args) for channel in args.channel}
    if args.json:
        print(json.dumps({"transfers": rows, "latency_us": taken}))
        return
    print(
        f"{args.flight} in flight, {args.stripes} stripe(s), {args.chunk_kib} KiB chunks; GB/s, CPU s/GB of both sides"
    )
    print(f"{'MiB':>5} {'':<7}{'channel':>8}{'(min':>7}{'max)':>6}{'pyzmq':>8}{'ratio':>7}{'CPU':>7}{'pyzmq':>7}")
    for row in rows:
        ours, theirs = row["gb_per_s"]["channel"], row["gb_per_s"]["pyzmq"]
        cpu = row["cpu_s_per_gb"]
        print(
            f"{row['mib']:>5g} {row['channel']:<7}{ours['median']:>8.2f}{ours['min']:>7.2f}{ours['max']:>6.2f}"
            f"{theirs['median']:>8.2f}{row['ratio']:>7.2f}{cpu['channel']:>7.2f}{cpu['pyzmq']:>7.2f}"
        )
    for row in rows[: len(args.channel)]:
        channel, link = row["channel"], row["link"]
        p50, p99 = taken[channel].values()
        print(f"64 KiB by {channel}: p50 {p50:.0f} us, p99 {p99:.0f} us; link test ", end="")
        print(f"{link['latency_us']:.0f} us, {link['gb_per_s']:.2f} GB/s")


if __name__ == "__main__":
    main()
