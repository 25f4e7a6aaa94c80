"""A decode worker's loop driven by hand: real engine, pool, policy, outbox and KV receiver, and no router.

Owns: rounds of the loop, what routers would have been told, and the checks that hold after every round.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lanewise.config import WorkerConfig
from lanewise.decode_worker.loop import DecodeLoop
from lanewise.engine.opening import open_sequence
from lanewise.engine.runner import Engine, Sampled, Work
from lanewise.engine.sequence import Sequence
from lanewise.policy.batching import make_batch_policy
from lanewise.policy.cost import CostModel
from lanewise.request import FinishReason, Mode, Sampling, Submission, Token
from lanewise.rpc.outbox import Batch, Outbox
from lanewise.transfer import Endpoint, Faults, Peer, Receiver, Sender

BYTES_PER_TOKEN = 2 * 3 * 2 * 16 * 4  # of the test model in fp32: 3 layers, K and V, 2 heads of 16


def load(directory: Path, pool_tokens: int) -> Engine:
    return Engine.load(
        WorkerConfig(
            model=str(directory), device="cpu", threads=1, page_tokens=8, kv_cache_bytes=pool_tokens * BYTES_PER_TOKEN
        )
    )


def submission(name: str, prompt: list[int], sampling: Sampling, **changes: Any) -> Submission:
    return replace(
        Submission(name, 1, Mode.LOCAL, tuple(prompt), (), sampling, None, 120.0, None),
        **changes,
    )


def alone(engine: Engine, asked: Submission) -> list[Token]:
    """What one request says with the engine for itself, one step after the other."""
    capacity = engine.pool.usage().capacity_tokens
    seq, _ = open_sequence(asked, engine, capacity)
    tokens: list[Token] = []
    while not tokens or tokens[-1].finish is None:
        assert engine.pool.ensure(seq, len(seq.ids))
        (sampled,) = engine.step([Work(seq, seq.num_uncomputed)])
        assert sampled is not None
        index = seq.num_output
        seq.ids.append(sampled.token_id)
        finish = seq.finish(sampled.token_id)
        tokens.append(Token(*seq.key, index, sampled.token_id, sampled.logprob, sampled.top, finish))
    engine.pool.release(seq)
    return tokens


class Late:
    """An engine whose device does nothing before it must: a launch is computed when its result is asked for.

    From what the host knew at the launch, into the pages that it had then. So pages that were given to someone else
    too early are spoilt, and the tokens show it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: list[LatePending] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def launch(self, work: list[Work], on_layers: None = None, after: LatePending | None = None) -> LatePending:
        assert len(self._waiting) <= 1
        pending = LatePending(self, work, after)
        self._waiting.append(pending)
        return pending

    def run(self, pending: LatePending) -> list[Sampled | None]:
        assert self._waiting.pop(0) is pending, "results are taken in the order of the launches"
        return self._engine.step(pending.copies)


class LatePending:
    done = False

    def __init__(self, late: Late, work: list[Work], after: LatePending | None) -> None:
        self._late, self._work = late, work
        self._after: list[tuple[Work, LatePending]] = []
        self.newest: dict[int, int] = {}
        self.copies = []
        for item in work:
            seq = item.seq
            copy = replace(
                seq, ids=list(seq.ids), num_computed=seq.num_launched, num_ahead=0, pages=array("i", seq.pages)
            )
            self.copies.append(Work(copy, item.num_new))
            if seq.num_uncomputed <= 0:
                assert seq.num_uncomputed == 0
                assert after is not None
                self._after.append((self.copies[-1], after))
            seq.num_ahead += item.num_new
            assert len(seq.pages) * late.pool.page_tokens >= seq.num_launched

    def result(self) -> list[Sampled | None]:
        for copied, after in self._after:
            copied.seq.ids.append(after.newest[copied.seq.key])
        sampled = self._late.run(self)
        for item, token in zip(self._work, sampled, strict=True):
            item.seq.num_ahead -= item.num_new
            item.seq.num_computed = min(item.seq.num_computed + item.num_new, len(item.seq.ids))
            if token is not None:
                self.newest[item.seq.key] = token.token_id
        return sampled


@dataclass
class Answer:
    """What a router was told of one attempt."""

    first: int = 0  # index of the first token it is due
    tokens: list[Token] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        return bool(self.failures) or self.cancelled or any(token.finish for token in self.tokens)

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def finish(self) -> FinishReason | None:
        return self.tokens[-1].finish if self.tokens else None

    def check(self) -> None:
        """Ends once, and nothing follows."""
        assert [token.index for token in self.tokens] == list(range(self.first, self.first + len(self.tokens)))
        assert all(token.finish is None for token in self.tokens[:-1])
        assert len(self.failures) + bool(self.finish) <= 1


class Here:
    """In place of the asyncio loop: what is handed over arrives at once."""

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, function: Callable[..., None], *args: Any) -> None:
        function(*args)


class Rig:
    """`mode`: plain, ahead, or late (ahead, on a device that computes as late as it can)."""

    def __init__(self, engine: Engine, mode: str, *, max_running: int = 8, max_batch_tokens: int = 64) -> None:
        self.engine = engine
        self.answers: dict[str, Answer] = {}
        self.blocks: set[bytes] = set()
        self.stats: Any = None
        self.now = 0.0  # beside the real time
        outbox = Outbox(Here(), self._deliver)  # type: ignore[arg-type]
        self.identity = Endpoint("decode", engine.fingerprint, engine.fingerprint_fields, engine.pool.layout)
        self.receiver = Receiver(self.identity, engine.pool, lambda event: self.loop.on_transfer(event))
        self.peer = Peer(self.receiver.start(), "decode")
        self.loop = DecodeLoop(
            Late(engine) if mode == "late" else engine,  # type: ignore[arg-type]
            make_batch_policy("lanewise", max_batch_tokens=max_batch_tokens, cost=CostModel()),
            self.receiver,
            outbox,
            Faults(),
            max_running=max_running,
            ttft_target_s=1.0,
            ahead=mode != "plain",
        )
        self.loop.clock = lambda: time.monotonic() + self.now
        self.most_out = 0
        self.left: set[tuple[str, int]] = set()  # ended in the middle of a step that was out

    def close(self) -> None:
        self.receiver.close()

    def _deliver(self, batch: Batch) -> None:
        for _, item in batch.items:
            if isinstance(item, Token):
                self.answers[item.request_id].tokens.append(item)
            elif item.HasField("failed"):
                self.answers[item.failed.request_id].failures.append(item.failed.message)
        if batch.stats is not None:
            self.stats = batch.stats
        self.blocks = (self.blocks | set(batch.blocks_added)) - set(batch.blocks_removed)

    def submit(self, asked: Submission) -> Answer:
        first = len(asked.resumed_output_ids) + (asked.mode is Mode.DECODE)
        answer = self.answers[asked.request_id] = Answer(first)
        self.loop.submit("router", asked)
        return answer

    def cancel(self, name: str) -> None:
        self.answers[name].cancelled = True
        self.loop.cancel((name, 1), "the client left")

    def round(self) -> float | None:
        """As the engine thread does one; then what must hold after each."""
        loop = self.loop
        loop._receive(0.0)
        now = loop.clock()
        loop._expire(now)
        sleep_s = loop.turn(now)
        loop.outbox.flush()
        self.most_out = max(self.most_out, len(loop._steps))
        self.check()
        return sleep_s

    def check(self) -> None:
        loop = self.loop
        live: list[Sequence] = [attempt.seq for attempt in (*loop.attempts.values(), *loop._closing.values())]
        live += [attempt.seq for attempt in loop._steps.leaving]
        self.left |= {attempt.key for attempt in loop._steps.leaving}
        assert self.engine.pool.audit(live) == []
        for seq in live:
            assert seq.num_computed <= len(seq.ids)
            assert seq.num_ahead == 0 or seq.num_launched <= len(seq.pages) * self.engine.pool.page_tokens
            assert seq.num_launched < seq.num_prompt + seq.sampling.max_tokens, "computed beyond its last token"
        for answer in self.answers.values():
            answer.check()

    def until(self, condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{self.loop.attempts}\n{self.answers}"
            if self.round():
                time.sleep(0.001)

    def finish(self) -> None:
        """Until nothing is open; then nobody holds a page."""
        self.round()  # what was asked for lies in the inbox
        self.until(lambda: self.loop.idle and not self.loop._steps)
        assert all(answer.ended for answer in self.answers.values())
        assert self.engine.pool.audit([]) == []
        assert self.engine.pool.usage().used_tokens == 0
        self.loop.report(force=True)
        assert self.blocks == set(self.engine.pool.snapshot())


class Prefiller:
    """A prefill worker's part by hand: computes a prompt with an engine of its own and sends it for real."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        identity = Endpoint("prefill", engine.fingerprint, engine.fingerprint_fields, engine.pool.layout)
        self.sender = Sender(identity, engine.pool, lambda event: None)
        self.sender.start()

    def close(self) -> None:
        self.sender.close()

    def send(self, asked: Submission, peer: Peer) -> Token:
        """The first token; the KV is on its way."""
        seq, key = open_sequence(asked, self.engine, self.engine.pool.usage().capacity_tokens)
        assert self.engine.pool.ensure(seq, len(seq.ids))
        (sampled,) = self.engine.step([Work(seq, len(seq.ids))])
        assert sampled is not None
        token = Token(*seq.key, 0, sampled.token_id, sampled.logprob, sampled.top)
        self.sender.begin(asked.key, peer, seq.ids, key, list(seq.pages))
        self.sender.ready(asked.key, len(seq.ids))
        self.sender.commit(asked.key, token)
        return token  # its pages stay: the test's pool is large enough
