"""Processes that die by SIGKILL at a named point of the protocol, or freeze and come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lanewise.fleet import LinkState
from lanewise.transfer import Aborted, Committed, Delivered, Limits, LinkReport, Offered, Peer

KEY, IDS = ("r", 1), list(range(200))
SCRIPT = Path(__file__).with_name("peer_process.py")


class Child:
    def __init__(self, spec: str, *arguments: str) -> None:
        environment = os.environ | {"LANEWISE_FAULTS": "1", "LANEWISE_FAULTS_SPEC": spec}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def child() -> Iterator[type[Child]]:
    made: list[Child] = []

    class Kept(Child):
        def __init__(self, *arguments: str) -> None:
            super().__init__(*arguments)
            made.append(self)

    yield Kept
    for each in made:
        each.close()


def offer(net, prefill, peer, key=KEY):
    pages = prefill.compute(IDS)
    prefill.sender.begin(key, peer, IDS, net.cache_key, pages)
    prefill.sender.commit(key, net.token(key))
    return pages


@pytest.mark.parametrize(
    "point", ["hello_ack_sent", "grant_sent", "chunk_writing#3", "recv.verifying", "commit_ack_sent"]
)
def test_decode_dies_and_another_incarnation_takes_its_place(net, child, point):

    dying = child(f"kill@{point}", "decode", "first", "tcp://127.0.0.1:0")
    prefill = net.prefill(timers=net.steady)
    pages = offer(net, prefill, Peer(dying.first_line, "first"))
    assert dying.process.wait(10) == -signal.SIGKILL
    end = prefill.log.wait((Aborted, Delivered), KEY)
    assert isinstance(end, Aborted) or point == "commit_ack_sent"
    decode = net.decode(timers=net.steady, listen=dying.first_line)
    decode.grant_all()
    again = ("r", 2)
    decode.receiver.expect(again, IDS, net.cache_key)
    prefill.sender.begin(again, decode.peer, IDS, net.cache_key, pages)
    prefill.sender.commit(again, net.token(again))
    prefill.log.wait(Delivered, again)
    assert np.array_equal(prefill.kv(pages, range(200)), decode.kv(again, range(200)))


@pytest.mark.parametrize("point", ["begin_sent", "mid_chunk#4", "chunk_sent#2", "commit_sent"])
def test_prefill_dies_and_decode_frees_or_has_everything(net, child, point):
    decode = net.decode(timers=net.steady)
    decode.grant_all()
    decode.receiver.expect(KEY, IDS, net.cache_key)
    dying = child(f"kill@{point}", "prefill", decode.address, decode.identity.incarnation)
    assert dying.process.wait(10) == -signal.SIGKILL
    if point == "commit_sent":
        end = decode.log.wait((Committed, Aborted), KEY)
    elif point == "begin_sent":
        # BEGIN may not have left the process: then the expectation is the loop's to cancel
        end = None
        net.eventually(lambda: not decode.receiver._thread.core._senders._heard, "the dead sender is forgotten")
        assert bool(decode.log.of(Aborted)) == bool(decode.log.of(Offered))
    else:
        end = decode.log.wait(Aborted, KEY)
    if isinstance(end, Aborted):
        assert end.reason == "the prefill worker is silent"


def test_frozen_decode_comes_back_and_its_link_heals(net, child):

    frozen = child("", "decode", "one", "tcp://127.0.0.1:0")
    prefill = net.prefill(timers=net.steady, limits=Limits(chunk_bytes=4096))
    peer = Peer(frozen.first_line, "one")
    prefill.sender.connect(peer)
    assert prefill.log.wait(LinkReport).link.state is LinkState.VERIFIED
    frozen.process.send_signal(signal.SIGSTOP)
    net.eventually(lambda: prefill.log.of(LinkReport)[-1].link.state is LinkState.FAILED, "the silence is noticed")
    frozen.process.send_signal(signal.SIGCONT)
    net.eventually(lambda: prefill.log.of(LinkReport)[-1].link.state is LinkState.VERIFIED, "the link heals")
    offer(net, prefill, peer)
    prefill.log.wait(Delivered, KEY)
