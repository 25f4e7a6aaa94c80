"""The Python client and the commands on it, against a real gRPC server in this process."""

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from lanewise.cli import main
from lanewise.client import Accepted, AsyncClient, Client, Delta, Finished
from lanewise.client_wire import make_request, parse_address
from lanewise.errors import ErrorCode, LanewiseError
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as stubs


class Service(stubs.InferenceServicer):
    """Echoes the prompt word by word; special prompts fail in the ways a router fails."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: dict[str, Any] = {}
        self.cancelled = threading.Event()

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        self.requests.append(request)
        self.metadata = {item.key: item.value for item in context.invocation_metadata()}
        if request.text == "endless":
            context.add_callback(self.cancelled.set)
        if request.text == "shed":
            context.set_trailing_metadata((("lanewise-code", "OVERLOADED"), ("retry-after-ms", "1500")))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is 9 s long")
        if request.text == "cut":
            return
        if request.text == "foreign":
            context.abort(grpc.StatusCode.NOT_FOUND, "who?")
        yield pb.GenerateEvent(accepted=pb.Accepted(request_id="r-1", prompt_tokens=2))
        words = request.text.split() or [str(i) for i in request.token_ids.ids] or ["chat"]
        for index, word in enumerate(words):
            yield pb.GenerateEvent(delta=pb.TextDelta(choice=0, text=word + " ", token_ids=[index]))
        if request.text == "endless":
            while not self.cancelled.wait(0.01):
                yield pb.GenerateEvent(delta=pb.TextDelta(choice=0, text="x", token_ids=[1]))
            return
        usage = pb.Usage(prompt_tokens=2, completion_tokens=len(words), cached_tokens=1)
        lost = pb.ErrorDetail(code="WORKER_LOST", message="both workers died") if request.text == "lost" else None
        reason = "error" if lost else "length"
        yield pb.GenerateEvent(finished=pb.Finished(choice=0, reason=reason, usage=usage, error=lost))

    def Explain(self, request: pb.ExplainRequest, context: grpc.ServicerContext) -> pb.ExplainReply:
        step = pb.ExplainStep(at_ms=1.5, epoch=1, what="routed", detail="prefill-0 -> decode-0")
        return pb.ExplainReply(request_id=request.request_id, steps=[step])

    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsReply:
        return pb.ListModelsReply(models=[pb.ModelInfo(id="fable", max_context_tokens=512)])


@pytest.fixture
def served() -> Iterator[tuple[Service, str]]:
    service = Service()
    server = grpc.server(ThreadPoolExecutor(4))
    stubs.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_events_and_text(served: tuple[Service, str]) -> None:
    service, address = served
    with Client(f"grpc://{address}", api_key="k") as client:
        events = list(client.generate("a b", max_tokens=3, temperature=0.0, stop=["."], ttft_target_s=0.25))
        assert [type(event) for event in events] == [Accepted, Delta, Delta, Finished]
        assert "".join(client.generate_text([7, 8], seed=5)) == "7 8 "
        assert list(client.generate_text([{"role": "user", "content": "hi"}])) == ["chat "]
        assert client.list_models()[0].id == "fable"
        assert client.explain("r-1")[0].what == "routed"
    text, ids, chat = service.requests
    assert (text.sampling.max_tokens, text.sampling.temperature, text.ttft_target_ms) == (3, 0.0, 250)
    assert text.sampling.HasField("temperature")
    assert not ids.sampling.HasField("temperature")  # what was not said is the server's to choose
    assert list(ids.token_ids.ids) == [7, 8]
    assert chat.chat.messages[0].content == "hi"
    assert service.metadata["authorization"] == "Bearer k"


def test_typed_errors(served: tuple[Service, str]) -> None:
    service, address = served
    with Client(address) as client:
        with pytest.raises(LanewiseError, match="queue is 9 s long") as shed:
            list(client.generate("shed"))
        assert (shed.value.code, shed.value.retry_after_s) == (ErrorCode.OVERLOADED, 1.5)
        with pytest.raises(LanewiseError) as foreign:
            list(client.generate("foreign"))
        assert foreign.value.code is ErrorCode.MODEL_NOT_FOUND
        with pytest.raises(LanewiseError, match="before the answer was finished"):
            list(client.generate("cut"))
        events: list[object] = []
        with pytest.raises(LanewiseError, match="both workers died"):
            events.extend(client.generate("lost"))
        pieces = client.generate("lost")
        assert [type(next(pieces)) for _ in range(3)] == [Accepted, Delta, Finished]
        service.cancelled.clear()
        with pytest.raises(LanewiseError) as late:
            list(client.generate("endless", timeout_s=0.2))
        assert late.value.code is ErrorCode.DEADLINE
        with pytest.raises(LanewiseError, match="bad request"):
            list(client.generate("x", colour=1))  # type: ignore[call-arg]


def test_leaving_early_cancels(served: tuple[Service, str]) -> None:
    service, address = served
    with Client(address) as client:
        pieces = client.generate_text("endless")
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        assert service.cancelled.wait(10)


async def test_async_client(served: tuple[Service, str]) -> None:
    service, address = served
    async with AsyncClient(address) as client:
        assert [piece async for piece in client.generate_text("a b c")] == ["a ", "b ", "c "]
        assert (await client.list_models())[0].max_context_tokens == 512
        assert (await client.explain("r-1"))[0].epoch == 1
        with pytest.raises(LanewiseError) as shed:
            async for _ in client.generate("shed"):
                pass
        assert shed.value.retry_after_s == 1.5
        service.cancelled.clear()
        async with contextlib.aclosing(client.generate("endless")) as events:  # type: ignore[type-var]
            async for _ in events:
                break
        assert service.cancelled.wait(10)


async def test_nobody_listens() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(LanewiseError, match=r"cannot reach 127\.0\.0\.1:1") as caught:
        client.list_models()
    assert caught.value.code is ErrorCode.NO_WORKERS
    async with AsyncClient("127.0.0.1:1") as other:
        with pytest.raises(LanewiseError, match="cannot reach"):
            await other.list_models()


def test_addresses_and_prompts() -> None:
    assert parse_address("host:1") == ("host:1", False)
    assert parse_address("grpcs://[::1]:9/") == ("[::1]:9", True)
    for bad, why in (("http://h:1/v1", "OpenAI address"), ("h", "expected a gRPC address"), ("ftp://h:1", "expected")):
        with pytest.raises(LanewiseError, match=why):
            parse_address(bad)
    for prompt in ([-1], [{"role": "user", "colour": "x"}], [1, "a"], []):
        with pytest.raises(LanewiseError) as caught:
            make_request(prompt, {})  # type: ignore[arg-type]
        assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_generate_and_explain_commands(served: tuple[Service, str], capsys: pytest.CaptureFixture[str]) -> None:
    service, address = served
    assert main(["generate", "a b", "--server", address, "--max-tokens", "4", "--temperature", "0", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "a b \n"
    assert (service.requests[0].sampling.max_tokens, service.requests[0].sampling.seed) == (4, 3)
    assert main(["generate", "a", "--server", address, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["text"], body["finish_reason"], body["usage"]["completion_tokens"]) == ("a ", "length", 1)
    assert main(["generate", "lost", "--server", address]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("lost \n", "lanewise: WORKER_LOST: both workers died\n")
    assert main(["generate", "shed", "--server", address, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["retry"] is True
    assert main(["explain", "r-1", "--server", address]) == 0
    assert "routed  prefill-0 -> decode-0" in capsys.readouterr().out
    assert main(["explain", "r-1", "--server", "http://x:1"]) == 1
    assert "OpenAI address" in capsys.readouterr().err
