"""`lanewise bench` against real servers: OpenAI events over HTTP and gRPC, with failures of every kind."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from lanewise.bench.drive import Sample, closed_loop, open_loop
from lanewise.bench.targets import Answer, OpenAiTarget, Settings, SseParser, connect
from lanewise.bench.workload import Ask, Lengths, Prompts, synthetic
from lanewise.cli import main
from lanewise.errors import ConfigError
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as stubs

SETTINGS = Settings("fable", 0.0, True, 5.0)


class OpenAi:
    """A small OpenAI server. `behave` says how the next requests are answered."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.behave = "well"
        self.running = self.most_running = 0
        self.four = asyncio.Barrier(4)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        return app

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fable"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self.answer(request, body)
        finally:
            self.running -= 1

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.behave == "in fours":
            async with asyncio.timeout(10):
                await self.four.wait()
        if self.behave == "shed":
            return web.json_response({"error": {"code": "OVERLOADED", "message": "later"}}, status=429)
        if self.behave == "plain 500":
            return web.Response(status=500, text="oops")
        if self.behave == "strict" and "ignore_eos" in body:
            return web.json_response({"error": {"type": "invalid", "message": "unknown: ignore_eos"}}, status=400)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": keep-alive\n\n")
        for index in range(body["max_tokens"]):
            if index == 1 and self.behave == "cut":
                return response
            if index == 1 and self.behave == "junk":
                await response.write(b"data: {nonsense\n\n")
            if index == 1 and self.behave == "error event":
                await response.write(b'data: {"error": {"code": "WORKER_LOST", "message": "gone"}}\n\n')
            if index == 1 and self.behave == "hang":
                await asyncio.sleep(30)
            last = index == body["max_tokens"] - 1
            choice = {
                "index": 0,
                "text": "" if self.behave == "mute" else "x",
                "finish_reason": "length" if last else None,
            }
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        return response


@pytest.fixture
async def openai() -> AsyncIterator[tuple[OpenAi, str]]:
    api = OpenAi()
    async with TestServer(api.app()) as server:
        yield api, str(server.make_url("/v1"))


async def in_thread(*argv: str) -> int:
    """The command has an event loop of its own; the server of the test keeps this one."""
    return await asyncio.to_thread(main, list(argv))


async def test_an_answer_with_its_times(openai: tuple[OpenAi, str]) -> None:
    api, url = openai
    target = OpenAiTarget(url, None)
    answer = await target.ask([1, 2, 3], 4, SETTINGS)
    await target.close()
    assert answer.error is None
    assert (answer.prompt_tokens, answer.output_tokens, answer.finish, len(answer.event_s)) == (3, 4, "length", 4)
    assert answer.sent_s < answer.event_s[0] <= answer.event_s[-1] <= answer.end_s
    assert api.bodies[0]["prompt"] == [1, 2, 3]
    assert api.bodies[0]["ignore_eos"] is True
    assert api.bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("behave", "kind"),
    [
        ("shed", "HTTP 429 OVERLOADED"),
        ("plain 500", "HTTP 500"),
        ("cut", "stream cut"),
        ("junk", "bad event"),
        ("error event", "WORKER_LOST"),
        ("hang", "timeout"),
    ],
)
async def test_failures_by_kind(openai: tuple[OpenAi, str], behave: str, kind: str) -> None:
    api, url = openai
    api.behave = behave
    target = OpenAiTarget(url, None)
    answer = await target.ask([1], 3, Settings("fable", 0.0, True, 0.3))
    await target.close()
    assert answer.error == kind
    assert answer.end_s >= answer.sent_s


async def test_tokens_without_text_still_have_a_first(openai: tuple[OpenAi, str]) -> None:
    api, url = openai
    api.behave = "mute"
    target = OpenAiTarget(url, None)
    answer = await target.ask([1], 3, SETTINGS)
    await target.close()
    assert (answer.error, len(answer.event_s), answer.output_tokens) == (None, 1, 3)


async def test_nobody_there() -> None:
    target = connect("http://127.0.0.1:1/v1", SETTINGS)
    assert (await target.ask([1], 1, SETTINGS)).error == "connect"
    with pytest.raises(ConfigError, match="no answer from"):
        await target.models()
    await target.close()
    for bad in ("ftp://x", "127.0.0.1:8000", "grpc://x"):
        with pytest.raises(ConfigError, match="expected"):
            connect(bad, SETTINGS)


def test_events_cut_anywhere_are_the_same() -> None:
    stream = b': hi\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata: one\ndata: two\n\ndata:[DONE]\n\n'
    whole = list(SseParser().feed(stream))
    assert whole == [b'{"a": 1}', b"one\ntwo", b"[DONE]"]
    for cut in range(len(stream)):
        parser = SseParser()
        assert [*parser.feed(stream[:cut]), *parser.feed(stream[cut:])] == whole


async def test_closed_loop_holds_its_concurrency(openai: tuple[OpenAi, str]) -> None:
    api, url = openai
    api.behave = "in fours"  # answers nobody before four are asking
    target = OpenAiTarget(url, None)
    one = Lengths.parse("8")
    samples: list[Sample] = []
    await closed_loop(target, synthetic(20, None, one, one, 0), Prompts(0, (1, 9)), SETTINGS, 4, samples.append)
    await target.close()
    assert len(samples) == 20
    assert api.most_running == 4
    assert {sample.answer.error for sample in samples} == {None}


async def test_open_loop_keeps_the_schedule_of_a_slow_server() -> None:
    class Slow:
        def __init__(self) -> None:
            self.free = asyncio.Event()
            self.running = 0

        async def ask(self, prompt: object, output_tokens: int, settings: Settings) -> Answer:
            loop = asyncio.get_running_loop()
            answer = Answer(loop.time())
            self.running += 1
            if self.running == 5:
                self.free.set()  # all have arrived, though none was answered
            async with asyncio.timeout(10):
                await self.free.wait()
            answer.event_s, answer.end_s = [loop.time()], loop.time()
            return answer

    asks = [Ask(i, i * 0.01, 4, 1, "4") for i in range(5)]
    samples: list[Sample] = []
    await open_loop(Slow(), asks, Prompts(0, (1, 9)), SETTINGS, samples.append)  # type: ignore[arg-type]
    starts = sorted(sample.scheduled_s for sample in samples)
    assert [round(start - starts[0], 6) for start in starts] == [0, 0.01, 0.02, 0.03, 0.04]
    assert all(sample.late_s >= 0 for sample in samples)


async def test_the_command(openai: tuple[OpenAi, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api, url = openai
    out, figure = tmp_path / "r.json", tmp_path / "r.png"
    status = await in_thread(
        *("bench", url, "--rate", "200", "--requests", "30", "--prompt-tokens", "80%:4,20%:40", "--output-tokens", "3"),
        *("--slo-ttft", "10s", "--slo-tpot", "10s", "--json", str(out), "--plot", str(figure), "--warmup", "1"),
    )
    shown = capsys.readouterr().out
    assert status == 0, shown
    report = json.loads(out.read_text())
    assert (report["requests"], report["succeeded"], report["model"]) == (30, 30, "fable")
    assert report["slo"]["attainment"] == 1.0
    assert set(report["ttft_ms_by_prompt"]) == {"4", "40"}
    assert len(report["per_request"]) == 30
    assert "goodput" in shown
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert len(api.bodies) == 31  # the warm-up was asked and not counted
    assert len({tuple(body["prompt"]) for body in api.bodies}) == 31


async def test_the_command_says_what_fails(openai: tuple[OpenAi, str], capsys: pytest.CaptureFixture[str]) -> None:
    api, url = openai
    api.behave = "shed"
    assert await in_thread("bench", url, "--concurrency", "2", "--requests", "3") == 1
    assert "the warm-up failed: HTTP 429 OVERLOADED: later" in capsys.readouterr().err
    assert await in_thread("bench", url, "--concurrency", "2", "--requests", "3", "--warmup", "0") == 1
    assert "HTTP 429 OVERLOADED: 3 (later)" in capsys.readouterr().out
    api.behave = "strict"
    assert await in_thread("bench", url, "--concurrency", "2", "--requests", "3", "--json", "-") == 0
    captured = capsys.readouterr()
    assert "does not know ignore_eos" in captured.err
    assert json.loads(captured.out)["failed"] == 0
    assert await in_thread("bench", url, "--concurrency", "1", "--slo-ttft", "0.4") == 2
    assert "--slo-ttft: expected a duration" in capsys.readouterr().err


class Generate(stubs.InferenceServicer):
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:
        yield pb.GenerateEvent(accepted=pb.Accepted(request_id="r"))
        for index in range(request.sampling.max_tokens):
            yield pb.GenerateEvent(delta=pb.TextDelta(text="", token_ids=[index]))
        usage = pb.Usage(prompt_tokens=len(request.token_ids.ids), completion_tokens=request.sampling.max_tokens)
        yield pb.GenerateEvent(finished=pb.Finished(reason="length", usage=usage))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsReply:
        return pb.ListModelsReply(models=[pb.ModelInfo(id="fable")])


async def test_grpc_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,4,2\n0.01,300,3\n")
    server = grpc.aio.server()
    stubs.add_InferenceServicer_to_server(Generate(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    run: Callable[..., Awaitable[int]] = in_thread
    assert await run("bench", f"grpc://127.0.0.1:{port}", "--trace", str(trace), "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompt_tokens"], report["output_tokens"], report["model"]) == (304, 5, "fable")
    assert report["mode"] == "trace t.csv x1"
    await server.stop(None)
