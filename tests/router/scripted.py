"""A worker that computes nothing and says what a test tells it to: the double that scripts failures for the router.

By default it behaves: a prefill worker answers with token 1, a decode worker commits and sends the rest, of one fixed
text. A test replaces `on_submit` to misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import grpc

import lanewise
from lanewise.config import RouterConfig
from lanewise.router.main import Router
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from lanewise.rpc.tokenizer_files import read_tokenizer_files
from lanewise.tokenizer import Tokenizer

FILES = read_tokenizer_files(Path(lanewise.__file__).parent / "models" / "fable", [2])
TOKENIZER = Tokenizer(FILES.tokenizer_json, chat_template=FILES.chat_template)
STORY = "The fox — né Grüße 🙂 — went home, and nobody saw it again. " * 40
STORY_IDS = TOKENIZER.encode(STORY)
CONTEXT = 2048
DEADLINE_S = 10.0


def story(tokens: int) -> str:
    """The text of that many tokens, without a character that is still incomplete."""
    return TOKENIZER.decode(STORY_IDS[:tokens]).rstrip("\ufffd")


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Poll with a deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


class Stream:
    """The worker's end of one session."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.outgoing: asyncio.Queue[pb.WorkerMessage | None] = asyncio.Queue()

    def send(self, **message: Any) -> None:
        self.outgoing.put_nowait(pb.WorkerMessage(**message))


class ScriptedWorker(pb_grpc.WorkerServicer):
    def __init__(self, role: str, name: str = "") -> None:
        self.role = role
        self.name = name or role
        self.incarnation = str(uuid.uuid4())
        self.fingerprint = "ff"
        self.kv_bytes_per_token = 0
        self.submits: list[pb.Submit] = []
        self.cancels: list[pb.Cancel] = []
        self.peers: list[pb.Peers] = []
        self.lanes: list[pb.SetLane] = []
        self.hellos: list[pb.RouterHello] = []
        self.stream: Stream | None = None
        self.mute = False  # answers nothing, pings included
        self.on_submit: Callable[[pb.Submit], Awaitable[None]] = self.behave
        self.address = ""
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ life

    async def start(self, port: int = 0) -> ScriptedWorker:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_WorkerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(grace=0)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def restart(self) -> None:
        """A new process at the same address: a new incarnation that remembers nothing."""
        port = int(self.address.rpartition(":")[2])
        await self.stop()
        self.incarnation = str(uuid.uuid4())
        await self.start(port)

    def drop_session(self) -> None:
        """The stream breaks, the process lives."""
        assert self.stream is not None
        self.stream.outgoing.put_nowait(None)

    # ------------------------------------------------------------ service

    def description(self) -> pb.Description:
        return pb.Description(
            role=self.role,
            name=self.name,
            incarnation=self.incarnation,
            address=self.address,
            kv_address="tcp://127.0.0.1:9" if self.role == "decode" else "",
            model="fable",
            fingerprint=self.fingerprint,
            max_context_tokens=CONTEXT,
            kv_capacity_tokens=100_000,
            vocab_size=TOKENIZER.vocab_size,
            tokenizer_hash=FILES.tokenizer_hash,
            kv_bytes_per_token=self.kv_bytes_per_token,
        )

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:
        reply = pb.DescribeReply(description=self.description())
        if request.with_tokenizer:
            reply.tokenizer_json = FILES.tokenizer_json
            reply.chat_template = FILES.chat_template
        return reply

    async def Session(self, request_iterator: Any, context: Any) -> None:
        hello = await context.read()
        self.hellos.append(hello.hello)
        stream = self.stream = Stream(context)
        stream.send(welcome=pb.Welcome(description=self.description()))
        stream.send(blocks=pb.BlockEvents(number=0, snapshot=True))
        stream.send(stats=self.stats())
        reader = asyncio.create_task(self._read(context))
        try:
            while (message := await stream.outgoing.get()) is not None:
                if not self.mute:
                    await context.write(message)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def stats(self, **changes: Any) -> pb.Stats:
        """Idle, every partner it was told of verified."""
        stats = pb.Stats(kv_capacity_tokens=100_000, lane="any", **changes)
        for peer in self.peers[-1].peers if self.peers else ():
            stats.links.add(peer=peer.incarnation, state="verified")
        return stats

    async def _read(self, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            match message.WhichOneof("message"):
                case "submit":
                    self.submits.append(message.submit)
                    task = asyncio.create_task(self.on_submit(message.submit))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                case "cancel":
                    self.cancels.append(message.cancel)
                case "ping":
                    self.say(pong=pb.Pong(number=message.ping.number))
                case "set_lane":
                    self.lanes.append(message.set_lane)
                case "peers":
                    self.peers.append(message.peers)
                    self.say(stats=self.stats())

    # ------------------------------------------------------------ what a test says

    def say(self, **message: Any) -> None:
        if self.stream is not None:
            self.stream.send(**message)

    def token(self, submit: pb.Submit, index: int, *, finish: str = "", token_id: int | None = None) -> None:
        out = pb.TokenOut(
            request_id=submit.request_id,
            epoch=submit.epoch,
            index=index,
            token_id=STORY_IDS[index % len(STORY_IDS)] if token_id is None else token_id,
            finish=finish,
        )
        if submit.sampling.HasField("logprobs"):
            out.logprob = -0.5
            for i in range(submit.sampling.logprobs):
                out.top.add(token_id=STORY_IDS[index % len(STORY_IDS)] + i, logprob=-0.5 - i)
        self.say(step=pb.Step(tokens=[out]))

    def accept(self, submit: pb.Submit, cached: int = 0) -> None:
        self.say(accepted=pb.SubmitAccepted(request_id=submit.request_id, epoch=submit.epoch, cached_tokens=cached))

    def commit(self, submit: pb.Submit) -> None:
        self.say(committed=pb.Committed(request_id=submit.request_id, epoch=submit.epoch))

    def fail(self, submit: pb.Submit, code: str, message: str = "", *, retryable: bool = True) -> None:
        failed = pb.Failed(
            request_id=submit.request_id, epoch=submit.epoch, code=code, message=message, retryable=retryable
        )
        self.say(failed=failed)

    def tokens(self, submit: pb.Submit, first: int, last: int) -> None:
        """Tokens first … last - 1; the one that reaches max_tokens says so."""
        for index in range(first, last):
            self.token(submit, index, finish="length" if index + 1 == submit.sampling.max_tokens else "")

    async def behave(self, submit: pb.Submit) -> None:
        done = len(submit.resumed_output_ids)
        self.accept(submit)
        if submit.mode == "prefill":
            self.tokens(submit, done, done + 1)
        elif submit.mode == "local":
            self.tokens(submit, done, submit.sampling.max_tokens)
        else:
            self.commit(submit)
            self.tokens(submit, done + 1, submit.sampling.max_tokens)

    async def silent(self, submit: pb.Submit) -> None:
        """Takes the work and does nothing."""


class Rig:
    """A router and scripted workers in this process, on free ports."""

    def __init__(self, router: Router, workers: list[ScriptedWorker], http: aiohttp.ClientSession) -> None:
        self.router = router
        self.workers = workers
        self.http = http
        self.url = f"http://{router.http}"
        self.grpc_address = str(router.grpc)

    @property
    def prefill(self) -> ScriptedWorker:
        return next(worker for worker in self.workers if worker.role == "prefill")

    @property
    def decode(self) -> ScriptedWorker:
        return next(worker for worker in self.workers if worker.role == "decode")

    async def connected(self) -> None:
        """Every worker that listens is welcomed, has sent its first statistics and is ready as far as it can be."""
        wanted = {worker.incarnation for worker in self.workers if worker._server is not None}
        pairs = {worker.role for worker in self.workers} == {"prefill", "decode"}

        def there() -> bool:
            sessions = [s for s in self.router.roster.sessions() if s.stats_at and not (pairs and s.not_ready)]
            return {s.identity.incarnation for s in sessions if s.identity} >= wanted

        await until(there, "workers connected")

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, Any, Mapping[str, str]]:
        body = {"model": "fable", **({"prompt": "Once"} if path == "/v1/completions" else {}), **body}
        async with self.http.post(self.url + path, json=body) as response:
            return response.status, await response.json(), response.headers

    async def text(self, tokens: int = 12, **body: Any) -> str:
        status, reply, _ = await self.post(max_tokens=tokens, **body)
        assert status == 200, reply
        return str(reply["choices"][0]["text"])


def config(scripted: list[ScriptedWorker], **settings: Any) -> RouterConfig:
    addresses = tuple(worker.address for worker in scripted)
    defaults = {"workers": addresses, "disaggregation": "Always", "ping_interval_s": 0.2}
    return RouterConfig(http="127.0.0.1:0", grpc="127.0.0.1:0", **{**defaults, **settings})


@contextlib.asynccontextmanager
async def rig(roles: str = "pd", **settings: Any) -> AsyncIterator[Rig]:
    """`roles`: one letter per worker, p or d. Names are p0, p1 … in that order."""
    names = {"p": "prefill", "d": "decode"}
    workers = [ScriptedWorker(names[letter], f"{letter}{i}") for i, letter in enumerate(roles)]
    for worker in workers:
        await worker.start()
    router = Router(config(workers, **settings))
    await router.start()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as http:
        made = Rig(router, workers, http)
        try:
            await made.connected()
            yield made
        finally:
            await router.stop()
            for worker in workers:
                await worker.stop()


def partly(
    worker: ScriptedWorker, last: int, then: Callable[[pb.Submit], Any]
) -> Callable[[pb.Submit], Awaitable[None]]:
    """A decode worker that sends tokens up to `last` of its first submission, then something else; behaves later."""
    first = True

    async def on_submit(submit: pb.Submit) -> None:
        nonlocal first
        if not first:
            await worker.behave(submit)
            return
        first = False
        worker.accept(submit)
        if submit.mode == "decode":
            worker.commit(submit)
        worker.tokens(submit, len(submit.resumed_output_ids) + (submit.mode == "decode"), last)
        await until(lambda: worker.stream is not None and worker.stream.outgoing.empty())
        then(submit)

    return on_submit


async def sse(made: Rig, **body: Any) -> list[Any]:
    """The events of a stream, in order; the last is the string that ended it."""
    out: list[Any] = []
    async with made.http.post(
        made.url + "/v1/completions", json={"model": "fable", "prompt": "Once", "stream": True, **body}
    ) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: "):
                data = line[6:].strip()
                out.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return out
