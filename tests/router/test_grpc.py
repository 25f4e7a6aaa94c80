"""The public gRPC API: events, errors as status and trailers, deadlines, cancellation, and what operators ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.router.scripted import CONTEXT, STORY_IDS, Rig, partly, rig, story, until


@pytest.fixture
async def made() -> AsyncIterator[Rig]:
    async with rig("d") as one:
        yield one


@pytest.fixture
async def channel(made: Rig) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(made.grpc_address) as one:
        yield one


@pytest.fixture
def inference(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.InferenceStub(channel)


def ask(text: str = "Once", **fields: Any) -> pb.GenerateRequest:
    sampling = fields.pop("sampling", {})
    return pb.GenerateRequest(model="fable", text=text, sampling={"max_tokens": 8, **sampling}, **fields)


async def events(call: Any) -> list[pb.GenerateEvent]:
    async with asyncio.timeout(10):
        return [event async for event in call]


async def status_of(call: Any) -> tuple[str, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events(call)
    trailing = caught.value.trailing_metadata() or ()
    return caught.value.code().name, {str(key): str(value) for key, value in trailing}


class TestGenerate:
    async def test_events(self, inference: Any) -> None:
        request = ask(client_request_id="mine", sampling={"logprobs": 1, "max_tokens": 20})
        got = await events(inference.Generate(request))
        assert got[0].accepted.client_request_id == "mine"
        assert got[0].accepted.prompt_tokens == 2
        deltas = [event.delta for event in got if event.WhichOneof("event") == "delta"]
        assert "".join(delta.text for delta in deltas) == story(20)
        assert [i for delta in deltas for i in delta.token_ids] == STORY_IDS[:20]
        assert all(len(entry.top) == 1 for delta in deltas for entry in delta.logprobs)
        assert sum(len(delta.logprobs) for delta in deltas) == 20
        finished = got[-1].finished
        assert (finished.reason, finished.usage.completion_tokens, finished.usage.prompt_tokens) == ("length", 20, 2)
        assert not finished.HasField("error")

    async def test_one_finished_per_choice(self, inference: Any) -> None:
        got = await events(inference.Generate(ask(n=3)))
        kinds = [event.WhichOneof("event") for event in got]
        assert kinds.count("accepted") == 1
        assert sorted(event.finished.choice for event in got if event.HasField("finished")) == [0, 1, 2]

    async def test_ids_without_text_are_told_too(self, made: Rig, inference: Any) -> None:
        async def ends(submit: pb.Submit) -> None:
            made.decode.tokens(submit, 0, 5)  # the last of these is a part of a character
            made.decode.token(submit, 5, finish="stop", token_id=2)

        made.decode.on_submit = ends
        got = await events(inference.Generate(ask()))
        ids = [i for event in got for i in event.delta.token_ids]
        assert ids == [*STORY_IDS[:5], 2]
        assert got[-1].finished.reason == "stop"
        assert got[-1].finished.usage.completion_tokens == 6

    async def test_stop_strings(self, inference: Any) -> None:
        got = await events(inference.Generate(ask(stop=["ox"], sampling={"max_tokens": 50})))
        assert "".join(event.delta.text for event in got) == "The f"
        assert (got[-1].finished.reason, got[-1].finished.stop_reason) == ("stop", "ox")

    async def test_chat_and_token_ids(self, made: Rig, inference: Any) -> None:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
        await events(inference.Generate(pb.GenerateRequest(chat=chat, sampling={"max_tokens": 2})))
        ids = pb.TokenIds(ids=[5, 6, 7])
        await events(inference.Generate(pb.GenerateRequest(token_ids=ids, ttft_target_ms=200)))
        assert list(made.decode.submits[1].prompt_ids) == [5, 6, 7]
        assert made.decode.submits[1].ttft_target_s == 0.2
        assert made.decode.submits[1].sampling.max_tokens == CONTEXT - 3


class TestErrors:
    @pytest.mark.parametrize(
        ("request_", "status", "code"),
        [
            (pb.GenerateRequest(model="fable"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
            (pb.GenerateRequest(model="fable", chat=pb.Chat()), "INVALID_ARGUMENT", "INVALID_REQUEST"),
            (pb.GenerateRequest(model="none", text="x"), "NOT_FOUND", "MODEL_NOT_FOUND"),
            (ask(sampling={"temperature": -1.0}), "INVALID_ARGUMENT", "INVALID_REQUEST"),
            (ask(sampling={"temperature": float("nan")}), "INVALID_ARGUMENT", "INVALID_REQUEST"),
            (ask("x " * 3000), "INVALID_ARGUMENT", "PROMPT_TOO_LONG"),
        ],
    )
    async def test_refusals(self, inference: Any, request_: pb.GenerateRequest, status: str, code: str) -> None:
        got, trailing = await status_of(inference.Generate(request_))
        assert (got, trailing["lanewise-code"], trailing["x-should-retry"]) == (status, code, "false")

    async def test_deadline_of_the_client(self, made: Rig, inference: Any) -> None:
        made.decode.on_submit = made.decode.silent
        got, _ = await status_of(inference.Generate(ask(), timeout=0.2))
        assert got == "DEADLINE_EXCEEDED"
        assert 0 < made.decode.submits[0].deadline_s <= 0.2
        await until(lambda: made.decode.cancels)

    async def test_cancel_reaches_the_worker(self, made: Rig, inference: Any) -> None:
        made.decode.on_submit = partly(made.decode, 3, lambda _: None)
        call = inference.Generate(ask(sampling={"max_tokens": 100}))
        async for event in call:
            if event.HasField("delta"):
                break
        call.cancel()
        await until(lambda: made.decode.cancels)
        assert made.router.dispatcher.num_running == 0

    async def test_failure_after_the_first_event_is_a_finished(self, made: Rig, inference: Any) -> None:
        made.decode.on_submit = partly(
            made.decode, 3, lambda submit: made.decode.fail(submit, "INTERNAL", "broke", retryable=False)
        )
        got = await events(inference.Generate(ask()))
        error = got[-1].finished.error
        assert (got[-1].finished.reason, error.code, error.message, error.should_retry) == (
            "error",
            "INTERNAL",
            "broke",
            False,
        )

    async def test_a_message_that_is_no_protobuf(self, channel: grpc.aio.Channel) -> None:
        call = channel.unary_stream("/lanewise.v1.Inference/Generate")
        got, trailing = await status_of(call(b"\xff\xff not protobuf"))
        assert (got, trailing["lanewise-code"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")

    async def test_retry_hint(self) -> None:
        async with rig("d", hold_timeout_s=0.05) as made:
            await made.decode.stop()
            await until(lambda: not made.router.roster.sessions())
            async with grpc.aio.insecure_channel(made.grpc_address) as channel:
                got, trailing = await status_of(pb_grpc.InferenceStub(channel).Generate(ask()))
        assert (got, trailing["lanewise-code"]) == ("UNAVAILABLE", "NO_WORKERS")
        assert (trailing["x-should-retry"], trailing["retry-after-ms"]) == ("true", "1000")

    async def test_message_too_large(self) -> None:
        async with rig("d", max_body_bytes=2000) as made, grpc.aio.insecure_channel(made.grpc_address) as channel:
            got, _ = await status_of(pb_grpc.InferenceStub(channel).Generate(ask("x" * 5000)))
            assert got == "RESOURCE_EXHAUSTED"

    async def test_api_keys(self, tmp_path: Any) -> None:
        keys = tmp_path / "keys"
        keys.write_text("secret\n")
        async with (
            rig("d", api_keys_file=str(keys)) as made,
            grpc.aio.insecure_channel(made.grpc_address) as channel,
        ):
            stub = pb_grpc.InferenceStub(channel)
            assert (await status_of(stub.Generate(ask())))[0] == "UNAUTHENTICATED"
            with pytest.raises(grpc.aio.AioRpcError, match="API key"):
                await stub.ListModels(pb.ListModelsRequest())
            metadata = (("authorization", "Bearer secret"),)
            assert (await events(stub.Generate(ask(), metadata=metadata)))[-1].finished.reason == "length"


class TestOthers:
    async def test_explain(self, made: Rig, inference: Any) -> None:
        made.decode.on_submit = partly(made.decode, 3, lambda _: made.decode.drop_session())
        got = await events(inference.Generate(ask()))
        reply = await inference.Explain(pb.ExplainRequest(request_id=got[0].accepted.request_id))
        assert [step.what for step in reply.steps] == ["placed", "first_token", "failover", "placed", "finished"]
        assert [step.epoch for step in reply.steps] == [1, 1, 1, 2, 2]
        assert "closed by the worker" in reply.steps[2].detail
        with pytest.raises(grpc.aio.AioRpcError, match="no request"):
            await inference.Explain(pb.ExplainRequest(request_id="nope"))

    async def test_models(self, inference: Any) -> None:
        reply = await inference.ListModels(pb.ListModelsRequest())
        assert [(model.id, model.max_context_tokens) for model in reply.models] == [("fable", CONTEXT)]

    async def test_fleet_snapshot(self, made: Rig, channel: grpc.aio.Channel, inference: Any) -> None:
        await events(inference.Generate(ask()))
        reply = await pb_grpc.FleetStub(channel).Snapshot(pb.FleetRequest())
        assert (reply.router, reply.arrivals, reply.held) == (made.router.incarnation, 1, 0)
        (worker,) = reply.workers
        assert (worker.description.incarnation, worker.ready, worker.inflight) == (made.decode.incarnation, True, 0)
        assert worker.stats.kv_capacity_tokens == 100_000

    async def test_health_follows_readiness(self, made: Rig, channel: grpc.aio.Channel) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="lanewise.v1.Inference")
        watch = stub.Watch(request)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await made.router.drain()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()

    async def test_reflection(self, channel: grpc.aio.Channel) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        await call.done_writing()
        names = {service.name for service in reply.list_services_response.service}
        assert {"lanewise.v1.Inference", "lanewise.v1.Fleet", "grpc.health.v1.Health"} <= names
        call.cancel()
