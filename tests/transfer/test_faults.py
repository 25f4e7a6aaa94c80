"""The fault hooks, and the channel under each fault of each message: equal pools or Aborted in time, never wrong."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from lanewise.errors import ConfigError
from lanewise.transfer import Aborted, Busy, Committed, Delivered, Faults, Limits, Peer
from lanewise.transfer.faults import is_loopback

FROM_SENDER = ["HELLO", "PROBE", "BEGIN", "CHUNK", "COMMIT", "ABORT", "PING"]
FROM_RECEIVER = ["HELLO_ACK", "PROBE_ACK", "GRANT", "ACK", "COMMIT_ACK", "ABORT_ACK", "PONG"]
KINDS = ["drop:{}:0.4:seed1", "duplicate:{}:0.5:seed2", "delay:{}:0.5:60ms:seed3", "corrupt:{}:0.4:seed4"]
KINDS += ["truncate:{}:0.4:seed5", "drop:{}:1.0"]


@pytest.mark.parametrize("kind", [*FROM_SENDER, *FROM_RECEIVER, "*"])
def test_each_fault_of_each_message(net, kind):
    runs = []
    for spec in KINDS:
        faults = [Faults.parse(spec.format(kind)), None]
        if kind in FROM_RECEIVER:
            faults.reverse()
        if kind == "*":
            faults = [Faults.parse(spec.format(kind)), Faults.parse(spec.format(kind))]
        limits = Limits(chunk_bytes=2048, window_bytes=16384)
        prefill = net.prefill(faults=faults[0], timers=net.fast, limits=limits)
        decode = net.decode(faults=faults[1], timers=net.fast, limits=limits)
        decode.grant_all(0)
        for number in range(3):
            key, ids = (f"r{number}", 1), list(range(70 + number))
            pages = prefill.compute(ids, number)
            decode.receiver.expect(key, ids, net.cache_key)
            prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
            prefill.sender.ready(key, 30)
            if number == 2:
                prefill.sender.abort(key, "changed my mind")
            else:
                prefill.sender.commit(key, net.token(key))
            runs.append((spec, prefill, decode, key, ids, pages))
    delivered = 0
    for spec, prefill, decode, key, ids, pages in runs:
        end = prefill.log.wait((Delivered, Busy, Aborted), key)
        assert len(prefill.log.of((Delivered, Busy, Aborted), key)) == 1
        committed = decode.log.of(Committed, key)
        if isinstance(end, Delivered):
            delivered += 1
            assert committed, spec
        if committed:
            assert committed[0].token == net.token(key)
            assert np.array_equal(prefill.kv(pages, range(len(ids))), decode.kv(key, range(len(ids)))), spec
    assert delivered >= (0 if kind == "*" else 2)


def test_spec_is_read_and_nonsense_refused():
    faults = Faults.parse("kill@begin_sent#3; drop:CHUNK:0.1:seed7;delay:ACK:0.5:20ms ;stop@recv.verifying")
    assert faults.deaths == {"begin_sent": (3, signal.SIGKILL), "recv.verifying": (1, signal.SIGSTOP)}
    assert [(rule.what, rule.kind, rule.delay_s) for rule in faults.rules] == [
        ("drop", "CHUNK", 0.0),
        ("delay", "ACK", 0.02),
    ]
    for bad in ("kill", "kill@", "drop:CHUNK", "delay:ACK:0.5", "drop:ACK:0.5:20ms", "explode:*:1.0", "kill@x#y"):
        with pytest.raises(ConfigError, match="cannot read"):
            Faults.parse(bad)


def test_same_seed_same_faults():
    def pattern() -> list[int]:
        faults = Faults.parse("drop:ACK:0.5:seed9")
        return [len(faults.deliveries("ACK", [b"x"])) for _ in range(50)]

    assert pattern() == pattern()
    assert 0 < sum(pattern()) < 50


def test_off_unless_asked_for_and_only_on_loopback():
    spec = {"LANEWISE_FAULTS_SPEC": "drop:*:1.0"}
    assert not Faults.from_env(spec, ["tcp://10.0.0.1:5"]).active
    on = spec | {"LANEWISE_FAULTS": "1"}
    assert Faults.from_env(on, ["tcp://127.0.0.1:5", "[::1]:5", "localhost:9"]).active
    for address in ("tcp://10.0.0.1:5", "0.0.0.0:1", "tcp://*:5", "example.com:1"):
        assert not is_loopback(address)
        with pytest.raises(ConfigError, match="loopback"):
            Faults.from_env(on, ["127.0.0.1:1", address])


def test_sides_with_faults_refuse_other_machines(net):
    faults = Faults.parse("drop:*:1.0")
    with pytest.raises(ConfigError, match="not loopback"):
        net.decode(faults=faults, listen="tcp://0.0.0.0:0")
    prefill = net.prefill(faults=faults)
    with pytest.raises(ConfigError, match="not loopback"):
        prefill.sender.connect(Peer("tcp://10.0.0.1:5", "x"))


def test_no_faults_cost_nothing_and_do_nothing():
    faults = Faults()
    faults.point("anything")
    assert not faults.active
    assert not faults.reached


def test_points_are_counted_until_death(monkeypatch):
    killed = []
    monkeypatch.setattr("os.kill", lambda pid, number: killed.append(number))
    faults = Faults.parse("kill@token2#2")
    for _ in range(3):
        faults.point("token1_sent")
        faults.point("token2")
    assert killed == [signal.SIGKILL]
