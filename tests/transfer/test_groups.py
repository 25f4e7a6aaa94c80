"""Data by process groups (gloo): the same bytes as by ZeroMQ, and a group or partner that dies hangs nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lanewise.errors import ConfigError
from lanewise.transfer import Aborted, Delivered, Faults, Limits, Peer
from lanewise.transfer.group_port import check, group_host
from lanewise.transfer.nccl_link import Staged

LOCAL = "127.0.0.1"
LIMITS = Limits(chunk_bytes=4096)
PROMPT = list(range(300))


def pair(net, device="cpu", **options):
    """A prefill and a decode side whose data goes by a group, once that is joined."""
    prefill = net.prefill(timers=net.steady, limits=LIMITS, group_host=LOCAL, group_device=device, **options)
    decode = net.decode(timers=net.steady, group_host=LOCAL, group_device=device)
    decode.grant_all()
    prefill.sender.connect(decode.peer)
    net.eventually(lambda: joined(prefill, decode), "the group is joined", 60)
    return prefill, decode


def joined(prefill, decode) -> bool:
    groups = prefill.sender._thread._ways.groups
    return groups is not None and groups.joined(decode.address)


def transfer(net, prefill, decode, key, seed=0):
    pages = prefill.compute(PROMPT, seed)
    decode.receiver.expect(key, PROMPT, net.cache_key)
    prefill.sender.begin(key, decode.peer, PROMPT, net.cache_key, pages)
    prefill.sender.commit(key, net.token(key))
    return pages


@pytest.mark.parametrize("device", ["cpu", "staged"])
def test_groups_and_zeromq_give_bit_equal_pools(net, device):
    """`staged`: payloads go as with NCCL, by a second group and memory between, only that this group is gloo's too."""
    prefill, decode = pair(net, device)
    plain, plain_decode = net.prefill(limits=LIMITS), net.decode()
    plain_decode.grant_all()
    found = []
    for side, other in ((prefill, decode), (plain, plain_decode)):
        for number in range(4):
            transfer(net, side, other, (f"r{number}", 1), number)
        for number in range(4):
            side.log.wait(Delivered, (f"r{number}", 1), 20)
        found.append([other.kv((f"r{number}", 1), range(len(PROMPT))) for number in range(4)])
    assert joined(prefill, decode)  # else both went by ZeroMQ
    assert plain.sender._thread._ways.groups is None
    assert all(np.array_equal(by_group, by_socket) for by_group, by_socket in zip(*found, strict=True))
    assert len({bytes(kv) for kv in found[0]}) == 4  # four different prompts' KV


@pytest.mark.parametrize("device", ["cpu", "staged"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_group_that_dies_loses_no_transfer(net, side, device):
    prefill, decode = pair(net, device)
    thread = prefill.sender._thread if side == "prefill" else decode.receiver._thread
    port = (thread._ways.groups if side == "prefill" else thread._groups).port
    sent = [transfer(net, prefill, decode, (f"r{number}", 1), number) for number in range(6)]
    os.kill(port.process.pid, signal.SIGKILL)
    for number, pages in enumerate(sent):
        prefill.log.wait(Delivered, (f"r{number}", 1), 20)
        tokens = range(len(PROMPT))
        assert np.array_equal(decode.kv((f"r{number}", 1), tokens), prefill.kv(pages, tokens))
    net.eventually(lambda: not joined(prefill, decode), "ZeroMQ carries on", 20)


def test_a_group_that_nobody_needs_any_more_ends_on_both_sides(net):
    prefill, decode = pair(net)
    sending, receiving = prefill.sender._thread, decode.receiver._thread
    assert len(receiving._groups._partners) == 1
    sending.command(lambda now: sending._ways.groups.forget(decode.address))
    net.eventually(lambda: not receiving._groups._partners, "the receiving side has let go", 10)
    transfer(net, prefill, decode, ("r", 1))  # by ZeroMQ
    prefill.log.wait(Delivered, ("r", 1), 20)


def test_lost_and_damaged_chunks_are_sent_again_by_a_group(net):
    faults = Faults.parse("a=drop@CHUNK#2;b=corrupt@CHUNK#3;c=duplicate@CHUNK#4;d=delay@CHUNK#5:50ms")
    prefill, decode = pair(net, faults=faults)
    pages = transfer(net, prefill, decode, ("r", 1))
    prefill.log.wait(Delivered, ("r", 1), 20)
    tokens = range(len(PROMPT))
    assert np.array_equal(decode.kv(("r", 1), tokens), prefill.kv(pages, tokens))
    seen = decode.receiver.snapshot()
    assert seen.chunks_corrupt + seen.malformed == 1  # the payload or the header was hit


@pytest.fixture
def far() -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("peer_process.py")
    words = [sys.executable, str(script), "decode", "far", "tcp://127.0.0.1:0", LOCAL]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_partner_that_dies_or_freezes_ends_its_transfers_in_time(net, far, blow):
    address = far.stdout.readline().strip()
    prefill = net.prefill(timers=net.steady, limits=LIMITS, group_host=LOCAL)
    peer = Peer(address, "far")
    prefill.sender.connect(peer)
    net.eventually(lambda: prefill.sender._thread._ways.groups.joined(address), "the group is joined", 60)
    far.send_signal(blow)
    pages = prefill.compute(PROMPT)
    started = time.monotonic()
    prefill.sender.begin(("r", 1), peer, PROMPT, net.cache_key, pages)
    prefill.sender.commit(("r", 1), net.token(("r", 1)))
    prefill.log.wait(Aborted, ("r", 1), 20)
    assert time.monotonic() - started < net.steady.grant_wait_s + net.steady.dead_s + 5


def test_groups_live_at_the_host_of_the_workers_address():
    assert group_host("NCCL", "tcp://10.0.0.7:5005") == "10.0.0.7"
    assert group_host("NCCL", "tcp://[fd00::1]:5005") == "fd00::1"
    assert group_host("NCCL", "decode-0") == "decode-0"
    assert group_host("ZeroMQ", "10.0.0.7:5005") == group_host("Auto", "10.0.0.7:5005") == ""


class Endless:
    """A group that posts and never ends, until it is aborted."""

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.posted = 0

    def send(self, *_: object) -> Endless:
        self.posted += 1
        return self

    recv = send

    def wait(self) -> None:
        if self.posted > 1:  # the first message makes the communicator
            assert self.aborted.wait(20)

    def abort(self) -> None:
        self.aborted.set()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_message_that_does_not_end_is_given_up(rank):
    """What a group of NCCL's may do; a receive that was given up must not count as one that ended."""
    group = Endless()
    staged = Staged(group, torch.device("cpu"), 64, rank)
    with pytest.raises(TimeoutError, match=r"no end within 0\.1 s"):
        (staged.receive if rank else staged.send)(torch.zeros(8, dtype=torch.uint8), 0.1)
    assert group.aborted.is_set()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each worker")
def test_chunks_go_by_nccl(net):
    prefill = net.prefill(timers=net.steady, limits=LIMITS, group_host=LOCAL, group_device="cuda:0")
    decode = net.decode(timers=net.steady, group_host=LOCAL, group_device="cuda:1")
    decode.grant_all()
    prefill.sender.connect(decode.peer)
    net.eventually(lambda: joined(prefill, decode), "the group is joined", 60)
    for number in range(4):
        pages = transfer(net, prefill, decode, (f"r{number}", 1), number)
        prefill.log.wait(Delivered, (f"r{number}", 1), 20)
        tokens = range(len(PROMPT))
        assert np.array_equal(decode.kv((f"r{number}", 1), tokens), prefill.kv(pages, tokens))
    assert joined(prefill, decode)


def test_what_is_not_built_is_refused_by_name():
    check("NCCL", device="cpu", encryption="None")
    check("Auto", device="cuda:0", encryption="Full")
    check("NCCL", device="cuda:0", encryption="None")
    check("IPC", device="cuda:0", encryption="None", shared=True)
    with pytest.raises(ConfigError, match="cuda:0: its memory cannot be shared"):
        check("IPC", device="cuda:0", encryption="None")
    for wrong in ({"encryption": "Full"}, {"encoding": "Int8"}, {"ranks": 2}):
        with pytest.raises(ConfigError, match="channel IPC"):
            check("IPC", **{"device": "cpu", "encryption": "None"} | wrong)
    check("IPC", device="cpu", encryption="None")
    with pytest.raises(ConfigError, match="expected encryption None, got Authenticated"):
        check("NCCL", device="cpu", encryption="Authenticated")
