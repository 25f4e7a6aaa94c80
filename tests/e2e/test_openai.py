"""The official OpenAI client, unchanged, against real processes."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.e2e.service import Service

pytestmark = pytest.mark.e2e
CHAT: list[dict[str, str]] = [{"role": "user", "content": "Tell me of the fox and the crow."}]


@pytest.fixture
def client(audited: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{audited.http}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["fable"]


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fable", messages=CHAT, max_tokens=24, seed=1)
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert 1 <= reply.usage.completion_tokens <= 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_takes_content_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Tell me of "}, {"type": "text", "text": "the fox and the crow."}]
    common = {"model": "fable", "max_completion_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(messages=CHAT, **common)
    split = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **common)
    assert split.choices[0].message.content == whole.choices[0].message.content


def test_streamed_chat_equals_the_whole_one_and_counts_usage(client: openai.OpenAI) -> None:
    common = {"model": "fable", "messages": CHAT, "max_tokens": 40, "seed": 5}
    whole = client.chat.completions.create(**common)
    chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(chunk.choices and chunk.choices[0].finish_reason) for chunk in chunks) == 1
    assert chunks[-1].usage == whole.usage
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 5, "not streamed"


def test_completion_and_stream(client: openai.OpenAI) -> None:
    common = {"model": "fable", "prompt": "There was once a", "max_tokens": 30, "seed": 9}
    whole = client.completions.create(**common)
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(**common, stream=True))
    assert text == whole.choices[0].text
    assert text


def test_prompts_as_lists_and_token_ids(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="fable", prompt=["A king", "A queen"], max_tokens=4, temperature=0)
    assert [choice.index for choice in reply.choices] == [0, 1]
    ids = client.completions.create(model="fable", prompt=[5, 6, 7, 8], max_tokens=4, temperature=0)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 4


def test_stop_cuts_before_the_string_even_across_tokens(client: openai.OpenAI) -> None:
    common = {"model": "fable", "prompt": "Once upon a time", "max_tokens": 60, "seed": 4, "temperature": 0.8}
    whole = client.completions.create(**common).choices[0].text
    for width in (1, 3, 7):
        stop = whole[20 : 20 + width]
        cut = client.completions.create(**common, stop=[stop]).choices[0]
        assert cut.finish_reason == "stop"
        assert cut.text == whole[: whole.index(stop)]


def test_n_choices_differ_and_the_first_is_the_one_without_n(client: openai.OpenAI) -> None:
    common = {"model": "fable", "prompt": "The old man said", "max_tokens": 16, "seed": 11, "temperature": 1.0}
    two = client.completions.create(**common, n=2)
    assert sorted(choice.index for choice in two.choices) == [0, 1]
    texts = {choice.index: choice.text for choice in two.choices}
    assert texts[0] != texts[1]
    assert texts[0] == client.completions.create(**common).choices[0].text
    assert two.usage is not None
    assert two.usage.completion_tokens == 32


def test_logprobs(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="fable", messages=CHAT, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content if chat.choices[0].logprobs else None
    assert content
    assert "".join(token.token for token in content).startswith((chat.choices[0].message.content or "")[:4])
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs), "greedy takes the most likely"
        assert token.logprob <= 0
    plain = client.completions.create(model="fable", prompt="A fox", max_tokens=5, temperature=0, logprobs=2)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == plain.choices[0].text
    assert all(value <= 0 for value in logprobs.token_logprobs or [1])


def test_seed_and_logit_bias(client: openai.OpenAI) -> None:
    common = {"model": "fable", "prompt": "The wolf", "max_tokens": 12, "temperature": 1.0}
    assert (
        client.completions.create(**common, seed=1).choices[0].text
        == client.completions.create(**common, seed=1).choices[0].text
    )
    texts = {client.completions.create(**common).choices[0].text for _ in range(4)}
    assert len(texts) > 1, "without a seed every call draws its own"
    forced = client.completions.create(**common, logit_bias={"65": 100}, seed=2).choices[0].text
    assert len(set(forced)) == 1


def test_errors_have_the_types_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-none", prompt="x")
    assert missing.value.code == "MODEL_NOT_FOUND"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="fable", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="fable",
            messages=CHAT,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert "tools" in str(tools.value)
    assert tools.value.response.headers["x-should-retry"] == "false"
