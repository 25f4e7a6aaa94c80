"""Workers of two ranks: the same text, KV to and from workers of one, and what happens when a rank is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import models
from tests.e2e.processes import Process, free_port, snapshot
from tests.e2e.service import generate_all, request, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
PROMPT = list(range(20, 160))


@dataclass
class Fleet:
    """A prefill worker, a decode worker and a router over both."""

    prefill: Process
    decode: Process
    grpc: str
    expected: list[int]

    def ask(self) -> list[int]:
        message = request(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True)
        return asyncio.run(generate_all(self.grpc, [message]))[0].token_ids

    def counters(self, role: str) -> dict[str, int]:
        return dict(next(w.stats.counters for w in snapshot(self.grpc).workers if w.description.role == role))

    def links(self) -> list[str]:
        return [link.state for worker in snapshot(self.grpc).workers for link in worker.stats.links]

    def has_moved_the_prompt_once(self) -> bool:
        """Each (layer, token, head) of one prompt has left, and arrived, once."""
        kv_bytes = len(PROMPT) * snapshot(self.grpc).workers[0].description.kv_bytes_per_token
        sent, got = self.counters("prefill"), self.counters("decode")
        return (sent["bytes_sent"], sent["chunks_resent"], got["bytes_received"]) == (kv_bytes, 0, kv_bytes)


@contextlib.contextmanager
def fleet(tmp_path: Path, prefill_flags: tuple[str, ...], decode_flags: tuple[str, ...]) -> Iterator[Fleet]:
    directory = models.make_model("qwen2", tmp_path / "model", seed=1)
    [expected] = models.oracle(directory, [PROMPT], 24)
    prefill_at, decode_at, grpc_at = (f"127.0.0.1:{free_port()}" for _ in range(3))
    model = ("--model", str(directory), "--served-name", "m", "--dtype", "float32", "--kernels", "torch")
    prefill = Process("prefill_worker", tmp_path / "prefill.log", "--listen", prefill_at, *model, *prefill_flags)
    decode = Process("decode_worker", tmp_path / "decode.log", "--listen", decode_at, *model, *decode_flags)
    router = Process(
        "router",
        tmp_path / "router.log",
        *("--grpc", grpc_at, "--http", f"127.0.0.1:{free_port()}", "--workers", f"{prefill_at},{decode_at}"),
        *("--disaggregation", "Always", "--hold-timeout-s", "4"),
    )
    with router, decode, prefill:
        until(lambda: ready(grpc_at) == 2, 90, lambda: str(snapshot(grpc_at)))
        found = Fleet(prefill, decode, grpc_at, expected)
        until(lambda: found.links() == ["verified"], 20, lambda: f"links are {found.links()}")  # until then: local
        yield found


def test_two_ranks_prefill_for_one_and_end_together(tmp_path: Path) -> None:
    with fleet(tmp_path, ("--tensor-parallel", "2"), ()) as found:
        assert found.ask() == found.expected
        until(found.has_moved_the_prompt_once, 10, lambda: f"{found.counters('prefill')}")
        assert found.counters("prefill")["chunks_sent"] % 2 == 0, "a chunk is of one rank's heads"
        (rank,) = children(found.prefill.popen.pid)
        os.kill(rank, signal.SIGKILL)
        assert found.prefill.popen.wait(20) == 1, "a worker without one of its ranks ends, and is started again"
        assert found.ask() == found.expected, "the decode worker serves alone"


@pytest.mark.parametrize(("prefill_ranks", "channel"), [(1, "Auto"), (2, "ZeroMQ")])
def test_two_ranks_decode_what_one_or_two_have_computed(tmp_path: Path, prefill_ranks: int, channel: str) -> None:
    """In pages of another size, too."""
    prefill = ("--kv-channel", channel, "--tensor-parallel", str(prefill_ranks), "--page-tokens", "8")
    with fleet(tmp_path, prefill, ("--kv-channel", channel, "--tensor-parallel", "2")) as found:
        assert found.ask() == found.expected
        until(found.has_moved_the_prompt_once, 10, lambda: f"{found.counters('prefill')}")
        assert found.counters("prefill")["chunks_sent"] % prefill_ranks == 0


def children(parent: int) -> list[int]:
    """Processes that `parent` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def ready(address: str) -> int:
    try:
        return sum(worker.ready for worker in snapshot(address).workers)
    except Exception:  # the router is still starting
        return 0
