"""`lanewise chaos`: a small campaign passes, the same without content hashes fails, and its parts do what they say."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lanewise.chaos.inject import Hit
from lanewise.chaos.plan import KINDS, MESSAGES, POINTS, RARE, Fault, draw, kinds_of
from lanewise.chaos.report import passed, recovery_s, summarise
from lanewise.chaos.traffic import Trip, prompts
from lanewise.transfer import messages as m
from lanewise.transfer.fault_shots import names_of_hits
from lanewise.transfer.faults import Faults

PROCESSES = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def campaign(*options: str, timeout_s: float = 280) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "lanewise", "chaos", "--json", "-", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_a_small_campaign_passes() -> None:
    code, report = campaign("--seed", "1", "--requests", "60", "--faults", "16", "--concurrency", "8")
    assert code == 0, report["problems"]
    assert report["requests"] >= 60
    assert report["faults"] == len(report["lines"]) == 16
    assert set(report["kinds"]) == set(KINDS)
    assert [report[name] for name in ("wrong", "hung", "failed", "leaked_blocks")] == [0, 0, 0, 0]
    assert report["recovery_p99_s"] <= 10
    assert sum(count for counts in report["hits"].values() for count in counts.values()) == 16


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_the_campaign_fails_when_content_is_not_hashed() -> None:
    """So many, because a client may leave before it reads what is wrong, and two tokens may be right by chance."""
    options = ("--seed", "1", "--requests", "60", "--faults", "24", "--kinds", "misbind", "--concurrency", "8")
    code, report = campaign(*options, "--no-content-hash")
    assert code == 1
    assert report["kinds"] == {"misbind": 24}
    hit = [line["request"] for line in report["lines"]]
    assert len(set(hit)) == 24, hit
    assert report["wrong"] > 0


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_two_thousand_faults_over_five_thousand_requests() -> None:
    code, report = campaign("--seed", "7", "--requests", "5000", "--faults", "2000", timeout_s=7000)
    assert code == 0, report["problems"][:10]
    assert report["requests"] >= 5000
    assert min(report["kinds"][kind] for kind in KINDS) >= 100, report["kinds"]


# ---------------------------------------------------------------- the draw


def test_the_draw_is_seeded_and_has_every_kind() -> None:
    assert kinds_of(2000, KINDS, random.Random(1)) == kinds_of(2000, KINDS, random.Random(1))
    counts = {kind: kinds_of(2000, KINDS, random.Random(1)).count(kind) for kind in KINDS}
    assert sum(counts.values()) == 2000
    assert min(counts.values()) >= 100
    assert set(kinds_of(8, KINDS, random.Random(1))) == set(KINDS)


def test_every_drawn_fault_can_be_read_and_aims_at_a_state_of_its_process() -> None:
    dice = random.Random(2)
    for number in range(2000):
        fault = draw(f"f{number}", dice.choice(KINDS), PROCESSES, dice)
        role = fault.process.partition("-")[0]
        assert fault.state in (*POINTS[role], *MESSAGES[role], *RARE[role], "begin")
        assert Faults.parse(fault.spec).shots, fault.spec


def test_prompts_differ_and_many_have_the_same_length() -> None:
    drawn = prompts(100, random.Random(3))
    assert len({prompt.ids for prompt in drawn}) == 100
    assert len({len(prompt.ids) for prompt in drawn}) == 5


# ---------------------------------------------------------------- single faults


def test_a_shot_hits_once_is_recorded_and_does_not_come_back(tmp_path: Path) -> None:
    file = tmp_path / "decode-0"
    file.write_text("a=drop@ACK#2; b=duplicate@GRANT; c=drop@ABORT")
    env = {"LANEWISE_FAULTS": "1", "LANEWISE_FAULTS_SPEC": f"@{tmp_path}/"}
    faults = Faults.from_env(env, ["127.0.0.1:1"], "decode-0")
    assert [len(faults.deliveries("ACK", [b"x"])) for _ in range(4)] == [1, 0, 1, 1]
    assert {name: request for name, (_, request) in names_of_hits(tmp_path / "decode-0.hits").items()} == {"a": ""}
    abort = m.encode(m.Abort("p", "d", "request", 1, "why"))
    assert faults.deliveries("ABORT", [abort]) == []
    assert names_of_hits(tmp_path / "decode-0.hits")["c"][1] == "request"
    again = Faults.from_env(env, ["127.0.0.1:1"], "decode-0")  # the process was restarted
    assert [len(again.deliveries("ACK", [b"x"])) for _ in range(3)] == [1, 1, 1]
    assert len(again.deliveries("GRANT", [b"x"])) == 2


def test_a_new_file_keeps_what_was_counted(tmp_path: Path) -> None:
    file = tmp_path / "p"
    file.write_text("a=drop@ACK#3")
    faults = Faults.from_env({"LANEWISE_FAULTS": "1", "LANEWISE_FAULTS_SPEC": f"@{file}"}, [])
    assert [len(faults.deliveries("ACK", [b"x"])) for _ in range(2)] == [1, 1]
    file.write_text("a=drop@ACK#3;b=misbind@begin;unbound")
    assert faults.armed("misbind")
    assert faults.unbound
    assert len(faults.deliveries("ACK", [b"x"])) == 0
    assert faults.take("misbind", "begin", "r")
    assert not faults.armed("misbind")


def test_a_shot_kills_when_its_point_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr("os.kill", lambda _pid, number: sent.append(number))
    faults = Faults.parse("a=kill@recv.granted#2;b=stop@chunk_sent")
    for point in ("recv.granted", "chunk_sent", "recv.granted", "recv.granted", "chunk_sent"):
        faults.point(point)
    assert sent == [signal.SIGSTOP, signal.SIGKILL]


# ---------------------------------------------------------------- the verdict


def trip(outcome: str, started: float, tokens: list[float], ended: float) -> Trip:
    return Trip(0, started, tokens, ended, outcome)


def test_recovery_is_of_the_slowest_request_under_way() -> None:
    hit = Hit(Fault("f", "decode-0", "kill", "committed", 1), at=10.0, resumed_at=10.0)
    trips = [
        trip("ok", 9.0, [9.5, 10.01, 10.4, 12.0], 12.0),  # 10.01 had left before the fault
        trip("ok", 9.0, [9.5, 13.0], 13.0),
        trip("ok", 10.5, [11.0, 30.0], 30.0),  # came later
        trip("cancelled", 9.0, [], 40.0),
    ]
    assert recovery_s(hit, trips) == 3.0
    paused = Hit(Fault("f", "decode-0", "stop", "committed", 1, pause_s=2.0), at=10.0, resumed_at=12.0)
    assert recovery_s(paused, trips) == 1.0


def test_a_fault_of_one_transfer_is_counted_for_its_request_alone() -> None:
    hit = Hit(Fault("f", "decode-0", "drop", "GRANT", 1), at=10.0, resumed_at=10.0, request="mine")
    mine, other = trip("ok", 9.9, [10.2, 12.0], 12.5), trip("ok", 9.0, [9.5, 19.0], 19.0)
    mine.request_id, other.request_id = "mine", "other"
    assert recovery_s(hit, [mine, other]) == 2.0  # its first token does not need the transfer


def test_anything_wrong_hung_failed_or_leaked_fails_the_campaign() -> None:
    good = summarise([trip("ok", 0, [1], 2), trip("cancelled", 0, [], 1)], [], 0, [], 1)
    assert passed(good)
    for outcome in ("wrong", "hung", "WORKER_LOST"):
        assert not passed(summarise([trip(outcome, 0, [1], 2)], [], 0, [], 1))
    assert not passed(summarise([], [], 1, [], 1))
    assert not passed(summarise([], [], 0, ["misbind"], 1))
    slow = Hit(Fault("f", "decode-0", "drop", "ACK", 1), at=1.0, resumed_at=1.0)
    assert not passed(summarise([trip("ok", 0, [12.5], 12.5)], [slow], 0, [], 1))
