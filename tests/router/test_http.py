"""The OpenAI HTTP API: what is accepted, what is refused and how, and that OpenAI's own client works with it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.router.scripted import CONTEXT, DEADLINE_S, TOKENIZER, Rig, partly, rig, sse, story, until

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture
async def made() -> AsyncIterator[Rig]:
    async with rig("d") as one:
        yield one


BAD: list[tuple[str, Any, int, str, str | None]] = [
    ("/v1/completions", b"{", 400, "INVALID_REQUEST", None),
    ("/v1/completions", b"[]", 400, "INVALID_REQUEST", None),
    ("/v1/completions", b"", 400, "INVALID_REQUEST", None),
    ("/v1/completions", b'{"model": "fable", "prompt": "\xff"}', 400, "INVALID_REQUEST", None),
    ("/v1/completions", b'{"model": "fable", "prompt": "\\ud800"}', 400, "INVALID_REQUEST", None),
    ("/v1/completions", b'{"prompt": "x"}', 400, "INVALID_REQUEST", "model"),
    ("/v1/completions", b'{"model": "fable"}', 400, "INVALID_REQUEST", "prompt"),
    ("/v1/completions", {"model": 3, "prompt": "x"}, 400, "INVALID_REQUEST", "model"),
    ("/v1/completions", {"prompt": {}}, 400, "INVALID_REQUEST", "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "INVALID_REQUEST", "prompt"),
    ("/v1/completions", {"prompt": ""}, 400, "INVALID_REQUEST", "prompt"),
    ("/v1/completions", {"prompt": [[]]}, 400, "INVALID_REQUEST", "prompt"),
    ("/v1/completions", {"prompt": [-1]}, 400, "INVALID_REQUEST", "prompt"),
    ("/v1/completions", {"prompt": [10**9]}, 400, "INVALID_REQUEST", "prompt"),
    ("/v1/completions", {"model": "gpt-9"}, 404, "MODEL_NOT_FOUND", "model"),
    ("/v1/completions", {"prompt": [1] * CONTEXT}, 400, "PROMPT_TOO_LONG", "prompt"),
    ("/v1/completions", {"max_tokens": CONTEXT}, 400, "INVALID_REQUEST", "max_tokens"),
    ("/v1/completions", {"max_tokens": 0}, 400, "INVALID_REQUEST", "max_tokens"),
    ("/v1/completions", {"temperature": -0.1}, 400, "INVALID_REQUEST", "temperature"),
    ("/v1/completions", {"temperature": "0.5"}, 400, "INVALID_REQUEST", "temperature"),
    ("/v1/completions", {"temperature": True}, 400, "INVALID_REQUEST", "temperature"),
    # Not JSON at all: the error names the byte.
    ("/v1/completions", b'{"model": "fable", "prompt": "x", "temperature": NaN}', 400, "INVALID_REQUEST", None),
    ("/v1/completions", {"top_p": 1.5}, 400, "INVALID_REQUEST", "top_p"),
    ("/v1/completions", {"n": 0}, 400, "INVALID_REQUEST", "n"),
    ("/v1/completions", {"n": 1000}, 400, "INVALID_REQUEST", "n"),
    ("/v1/completions", {"seed": 2**70}, 400, "INVALID_REQUEST", "seed"),
    ("/v1/completions", {"presence_penalty": 3}, 400, "INVALID_REQUEST", "presence_penalty"),
    ("/v1/completions", {"min_tokens": -1}, 400, "INVALID_REQUEST", "min_tokens"),
    ("/v1/completions", {"stop": ["a"] * 5}, 400, "INVALID_REQUEST", "stop"),
    ("/v1/completions", {"stop": ""}, 400, "INVALID_REQUEST", "stop"),
    ("/v1/completions", {"stop": [1]}, 400, "INVALID_REQUEST", "stop[0]"),
    ("/v1/completions", {"logprobs": 21}, 400, "INVALID_REQUEST", "logprobs"),
    ("/v1/completions", {"logit_bias": {"x": 1}}, 400, "INVALID_REQUEST", "logit_bias"),
    ("/v1/completions", {"logit_bias": {"999999": 1}}, 400, "INVALID_REQUEST", "logit_bias"),
    ("/v1/completions", {"logit_bias": {"5": 101}}, 400, "INVALID_REQUEST", "logit_bias"),
    ("/v1/completions", {"stop_token_ids": [-1]}, 400, "INVALID_REQUEST", "stop_token_ids"),
    ("/v1/completions", {"echo": True}, 400, "INVALID_REQUEST", "echo"),
    ("/v1/completions", {"suffix": "end"}, 400, "INVALID_REQUEST", "suffix"),
    ("/v1/completions", {"best_of": 3}, 400, "INVALID_REQUEST", "best_of"),
    ("/v1/completions", {"stream_options": {"include_usage": True}}, 400, "INVALID_REQUEST", "stream_options"),
    ("/v1/completions", {"stream": True, "stream_options": {"x": 1}}, 400, "INVALID_REQUEST", "stream_options.x"),
    ("/v1/completions", {"temprature": 1}, 400, "INVALID_REQUEST", "temprature"),
    ("/v1/completions", {"guided_json": {}}, 400, "INVALID_REQUEST", "guided_json"),
    ("/v1/chat/completions", {"messages": []}, 400, "INVALID_REQUEST", "messages"),
    ("/v1/chat/completions", {"messages": "hi"}, 400, "INVALID_REQUEST", "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "INVALID_REQUEST", "messages[0].content"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "boss", "content": ""}]},
        400,
        "INVALID_REQUEST",
        "messages[0].role",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "tool", "content": ""}]},
        400,
        "INVALID_REQUEST",
        "messages[0].role",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a " * 3000}]},
        400,
        "PROMPT_TOO_LONG",
        "messages",
    ),
    ("/v1/chat/completions", {"tools": [{"type": "function"}]}, 400, "INVALID_REQUEST", "tools"),
    ("/v1/chat/completions", {"functions": [{}]}, 400, "INVALID_REQUEST", "functions"),
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, 400, "INVALID_REQUEST", "response_format"),
    ("/v1/chat/completions", {"modalities": ["text", "audio"]}, 400, "INVALID_REQUEST", "modalities"),
    ("/v1/chat/completions", {"audio": {"voice": "x"}}, 400, "INVALID_REQUEST", "audio"),
    ("/v1/chat/completions", {"reasoning_effort": "low"}, 400, "INVALID_REQUEST", "reasoning_effort"),
    ("/v1/chat/completions", {"logprobs": 1}, 400, "INVALID_REQUEST", "logprobs"),
    ("/v1/chat/completions", {"top_logprobs": 3}, 400, "INVALID_REQUEST", "top_logprobs"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, 400, "INVALID_REQUEST", "logprobs"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        *(400, "INVALID_REQUEST", "messages[0].content[0].type"),
    ),
]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


class TestRefusals:
    async def test_table(self, made: Rig) -> None:
        for path, body, status, code, param in BAD:
            complete = {"model": "fable", **(CHAT if "chat" in path else {"prompt": "x"})}
            raw = body if isinstance(body, bytes) else json.dumps({**complete, **body}).encode()
            async with made.http.post(made.url + path, data=raw) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"], error["param"]) == (status, code, param), (body, error)
                assert response.headers["x-should-retry"] == "false"
                assert error["message"]
                assert error["type"] == "invalid_request_error"
        assert made.decode.submits == []

    async def test_prompt_too_long_names_tokens_and_limit(self, made: Rig) -> None:
        _, reply, _ = await made.post(prompt=[1] * 3000)
        assert "3000 tokens" in reply["error"]["message"]
        assert str(CONTEXT) in reply["error"]["message"]

    async def test_unknown_paths_and_methods(self, made: Rig) -> None:
        for method, path, status in (
            ("GET", "/v1/completions", 405),
            ("POST", "/v1/embeddings", 404),
            ("GET", "/", 404),
        ):
            async with made.http.request(method, made.url + path) as response:
                assert response.status == status
                assert (await response.json())["error"]["type"] == "invalid_request_error"

    async def test_body_too_large(self) -> None:
        async with rig("d", max_body_bytes=2000) as made:
            status, reply, _ = await made.post(prompt="x" * 3000)
            assert (status, reply["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")

            async def endless() -> AsyncIterator[bytes]:  # no Content-Length to refuse by
                for _ in range(100):
                    yield b" " * 1000

            async with made.http.post(made.url + "/v1/completions", data=endless()) as response:
                assert response.status == 413
            assert await made.text() == story(12)

    async def test_harmless_parameters(self, made: Rig) -> None:
        status, reply, _ = await made.post(
            "/v1/chat/completions",
            **CHAT,
            max_completion_tokens=4,
            user="u",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            parallel_tool_calls=True,
            tool_choice="none",
            response_format={"type": "text"},
            modalities=["text"],
            tools=None,
            stop=None,
            n=None,
        )
        assert status == 200, reply


class TestAnswers:
    async def test_every_parameter_reaches_the_worker(self, made: Rig) -> None:
        await made.post(
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            top_k=-1,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.1,
            logit_bias={"5": -100},
            seed=-1,
            min_tokens=2,
            stop_token_ids=[7],
            ignore_eos=True,
            logprobs=2,
        )
        s = made.decode.submits[0].sampling
        assert (s.max_tokens, s.temperature, s.top_p, s.top_k, s.min_p) == (5, 0.5, 0.9, 0, 0.1)
        assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (1, -1, 1.1)
        assert (dict(s.logit_bias), s.seed, s.min_tokens) == ({5: -100.0}, 2**64 - 1, 2)
        assert (list(s.stop_token_ids), s.ignore_eos, s.logprobs) == ([7], True, 2)

    async def test_defaults(self, made: Rig) -> None:
        await made.post()
        await made.post("/v1/chat/completions", **CHAT)
        completion, chat = made.decode.submits
        assert completion.sampling.max_tokens == 16
        assert chat.sampling.max_tokens == CONTEXT - len(chat.prompt_ids)
        assert list(chat.prompt_ids) == TOKENIZER.encode_chat(CHAT["messages"])
        assert completion.sampling.seed != chat.sampling.seed

    async def test_prompt_shapes(self, made: Rig) -> None:
        ids = TOKENIZER.encode("Once")
        for prompt, choices in (("Once", 1), (["Once", "Once"], 2), (ids, 1), ([ids, ids, ids], 3)):
            made.decode.submits.clear()
            status, reply, _ = await made.post(prompt=prompt, max_tokens=3)
            assert status == 200
            assert [choice["index"] for choice in reply["choices"]] == list(range(choices))
            assert all(list(submit.prompt_ids) == ids for submit in made.decode.submits)

    async def test_content_parts_and_roles(self, made: Rig) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "D"}, {"role": "user", "content": parts}]
        await made.post("/v1/chat/completions", messages=messages, max_tokens=1)
        plain = [{"role": "system", "content": "D"}, {"role": "user", "content": "ab"}]
        assert list(made.decode.submits[0].prompt_ids) == TOKENIZER.encode_chat(plain)

    async def test_stream_equals_whole(self, made: Rig) -> None:
        whole = await made.post(max_tokens=40, logprobs=1)
        events = await sse(made, max_tokens=40, logprobs=1, stream_options={"include_usage": True})
        assert events[-1] == "[DONE]"
        assert events[-2]["choices"] == []
        assert events[-2]["usage"] == whole[1]["usage"]
        assert all(event["usage"] is None for event in events[:-2])
        choices = [event["choices"][0] for event in events[:-2]]
        assert "".join(choice["text"] for choice in choices) == whole[1]["choices"][0]["text"] == story(40)
        assert [choice["finish_reason"] for choice in choices][-1] == "length"
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            streamed = [value for choice in choices if choice["logprobs"] for value in choice["logprobs"][name]]
            assert streamed == whole[1]["choices"][0]["logprobs"][name]
            assert len(streamed) == 40

    async def test_stop_id_has_no_text_but_counts(self, made: Rig) -> None:
        async def ends(submit: Any) -> None:
            made.decode.tokens(submit, 0, 3)
            made.decode.token(submit, 3, finish="stop", token_id=9)

        made.decode.on_submit = ends
        _, reply, _ = await made.post(max_tokens=10, stop_token_ids=[9])
        assert reply["choices"][0] | {"logprobs": None} == {
            "index": 0,
            "text": story(3),
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": "9",
        }
        assert reply["usage"]["completion_tokens"] == 4

    async def test_error_in_mid_stream(self, made: Rig) -> None:
        made.decode.on_submit = partly(
            made.decode, 5, lambda submit: made.decode.fail(submit, "INTERNAL", "broke", retryable=False)
        )
        events = await sse(made, max_tokens=10, n=1)
        assert events[-1]["error"] | {"param": None} == {
            "message": "broke",
            "type": "server_error",
            "param": None,
            "code": "INTERNAL",
        }

    async def test_headers(self, made: Rig) -> None:
        async with made.http.post(
            made.url + "/v1/completions",
            json={"model": "fable", "prompt": "x"},
            headers={"x-request-id": "mine", "x-slo-ttft-ms": "250"},
        ) as response:
            assert response.headers["x-request-id"] == "mine"
        assert made.decode.submits[0].ttft_target_s == 0.25
        assert made.decode.submits[0].request_id != "mine"
        async with made.http.post(
            made.url + "/v1/completions", json={"model": "fable", "prompt": "x"}, headers={"x-slo-ttft-ms": "soon"}
        ) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, "x-slo-ttft-ms")

    async def test_nodelay(self, made: Rig) -> None:
        async with made.http.get(made.url + "/healthz"):
            pass
        _, writer = await asyncio.open_connection(made.router.http.host, made.router.http.port)
        await until(lambda: made.router._http.connections)
        for connection in made.router._http.connections:
            sock = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()
        await writer.wait_closed()


class TestOperations:
    async def test_models_health_metrics(self, made: Rig) -> None:
        await made.text()
        async with made.http.get(made.url + "/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["fable"]
        async with made.http.get(made.url + "/v1/models/fable") as response:
            assert (await response.json())["max_model_len"] == CONTEXT
        async with made.http.get(made.url + "/v1/models/none") as response:
            assert response.status == 404
        for path in ("/healthz", "/readyz"):
            async with made.http.get(made.url + path) as response:
                assert response.status == 200
        text = ""
        async with asyncio.timeout(DEADLINE_S):  # an answer leaves before it is counted
            while 'lanewise_requests_total{outcome="length"} 1.0' not in text:
                async with made.http.get(made.url + "/metrics") as response:
                    text = await response.text()
        assert "lanewise_output_tokens_total 12.0" in text
        assert "lanewise_ttft_seconds_count 1.0" in text
        assert 'lanewise_worker_kv_capacity_tokens{incarnation="' in text
        documented = set(re.findall(r"\blanewise_[a-z_]+\b", (DOCS / "scaling.md").read_text(encoding="utf-8")))
        assert len(documented) >= 4
        assert documented <= set(re.findall(r"^(\w+)", text, re.MULTILINE)), "what docs tell an HPA to look at"

    async def test_starts_without_workers(self) -> None:
        async with rig("") as made:
            async with made.http.get(made.url + "/readyz") as response:
                assert response.status == 503
            async with made.http.get(made.url + "/healthz") as response:
                assert response.status == 200

    async def test_api_keys(self, tmp_path: Path) -> None:
        keys = tmp_path / "keys"
        keys.write_text("# ours\nsecret\n")
        async with rig("d", api_keys_file=str(keys)) as made:
            status, reply, _ = await made.post()
            assert (status, reply["error"]["code"]) == (401, "UNAUTHENTICATED")
            made.http.headers["Authorization"] = "Bearer wrong"
            assert (await made.post())[0] == 401
            made.http.headers["Authorization"] = "Bearer secret"
            assert (await made.post())[0] == 200
            assert made.decode.submits[0].tenant_salt != b""
            async with made.http.get(made.url + "/readyz") as response:
                assert response.status == 200


class TestOpenAIClient:
    @pytest.fixture
    async def client(self, made: Rig) -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(base_url=made.url + "/v1", api_key="none", timeout=10) as client:
            yield client

    async def test_chat(self, client: openai.AsyncOpenAI) -> None:
        messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        answer = await client.chat.completions.create(
            model="fable", messages=messages, max_completion_tokens=9, logprobs=True, top_logprobs=2, n=2
        )
        assert [choice.message.content for choice in answer.choices] == [story(9)] * 2
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 18
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode(errors="ignore") == story(9)
        assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 9

    async def test_chat_stream(self, client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="fable",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == story(20)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 20
        assert chunks[-2].choices[0].finish_reason == "length"

    async def test_completions_models_and_errors(self, made: Rig, client: openai.AsyncOpenAI) -> None:
        answer = await client.completions.create(model="fable", prompt=["a", "b"], max_tokens=5, logprobs=1)
        assert [choice.text for choice in answer.choices] == [story(5)] * 2
        assert [model.id async for model in client.models.list()] == ["fable"]
        with pytest.raises(openai.NotFoundError, match="gpt-9"):
            await client.completions.create(model="gpt-9", prompt="a")
        tool: Any = {"type": "function", "function": {"name": "f"}}
        with pytest.raises(openai.BadRequestError, match="tools"):
            await client.chat.completions.create(
                model="fable", messages=[{"role": "user", "content": "a"}], tools=[tool]
            )
        made.decode.on_submit = partly(
            made.decode, 3, lambda submit: made.decode.fail(submit, "INTERNAL", "broke", retryable=False)
        )
        stream = await client.completions.create(model="fable", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="broke"):
            async for _ in stream:
                pass
