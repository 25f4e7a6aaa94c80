"""The OpenAI requests this router understands, field by field.

Owns: which fields are accepted, ignored or refused, and turning a valid body into a GenerationRequest.
Must not: check ranges (sampling.py does, for both transports) or answer. A field that would change the output and is
not supported is refused by name; so is a field nobody knows: silence would be a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from lanewise.errors import LanewiseError, invalid
from lanewise.router.sampling import Chat, GenerationRequest, Options, Prompt

COMPLETION_TOKENS = 16  # OpenAI's own default of max_tokens for completions

B = TypeVar("B", bound="_Common")


# msgspec and not pydantic: between rare requests the code is cold in the caches, and this is far less of it.
class _Model(msgspec.Struct, forbid_unknown_fields=True):
    pass


class StreamOptions(_Model, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Common(_Model, kw_only=True):
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    # Extensions, as other open servers spell them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    # Accepted and without effect on the output.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    parallel_tool_calls: Any = None
    # Refused unless they ask for what happens anyway.
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(_Common, kw_only=True):
    prompt: Any  # checked by `_prompts`: a union of lists would be tried member by member, for every id
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class Message(_Model, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None


class ChatBody(_Common, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
}


def parse_completion(raw: bytes) -> CompletionBody:
    body = _parse(CompletionBody, raw)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of other than n is not supported", "best_of")
    return body


def parse_chat(raw: bytes) -> ChatBody:
    body = _parse(ChatBody, raw)
    if not body.messages:
        raise invalid("messages must not be empty", "messages")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    return body


def completion_request(body: CompletionBody) -> GenerationRequest:
    return _request(body, _prompts(body.prompt), body.max_tokens, body.logprobs, COMPLETION_TOKENS)


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    """A text, texts, the ids of one prompt, or the ids of several."""
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list):
        kinds = set(map(type, prompt))
        if kinds == {int}:
            return (tuple(prompt),)
        if kinds == {str}:
            return tuple(prompt)
        if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in prompt):
            return tuple(map(tuple, prompt))
        if not prompt:
            return ()
    raise invalid("prompt: expected a string, strings, token ids, or lists of token ids", "prompt")


def chat_request(body: ChatBody) -> GenerationRequest:
    messages = tuple(_message(i, message) for i, message in enumerate(body.messages))
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _request(body, (Chat(messages),), max_tokens, (body.top_logprobs or 0) if body.logprobs else None)


def _request(
    body: _Common,
    prompts: tuple[Prompt, ...],
    max_tokens: int | None,
    logprobs: int | None,
    default_max_tokens: int | None = None,
) -> GenerationRequest:
    options = Options(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias or {},
        seed=body.seed,
        min_tokens=body.min_tokens,
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        default_max_tokens=default_max_tokens,
    )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    n = 1 if body.n is None else body.n
    return GenerationRequest(model=body.model, prompts=prompts, options=options, stop=stop, n=n)


def _message(index: int, message: Message) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.role in ("tool", "function"):
        raise invalid(f"messages of role {message.role!r} are not supported", f"{where}.role")
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if getattr(message, name):
            raise invalid(f"{name} is not supported", f"{where}.{name}")
    content = message.content
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    if content is None:
        raise invalid("content must be a string or an array of text parts", f"{where}.content")
    # "developer" is OpenAI's newer word for "system"; templates know the older one.
    out = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.name is not None:
        out["name"] = message.name
    return out


def _part(where: str, part: dict[str, Any]) -> str:
    if part.get("type") != "text":
        raise invalid(f"content parts of type {part.get('type')!r} are not supported, only text", f"{where}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid("a text part needs a string `text`", f"{where}.text")
    return text


_DECODERS: dict[type[_Common], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (CompletionBody, ChatBody)
}
_REFUSED = {kind: tuple(name for name in _NEUTRAL if name in kind.__struct_fields__) for kind in _DECODERS}
_WHERE = re.compile(r"(.*?)(?: - at (?:`key` in )?`\$\.?(.*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (contains unknown|missing required) field `(.*)`")


def _parse(kind: type[B], raw: bytes) -> B:
    try:
        body: B = _DECODERS[kind].decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _explain(error, raw) from None
    for name in _REFUSED[kind]:
        value = getattr(body, name)
        if value is not None and value not in _NEUTRAL[name]:
            raise invalid(f"{name} is not supported by this server", name)
    return body


def _explain(error: Exception, raw: bytes) -> LanewiseError:
    """The first problem, in words that name the field as the client wrote it."""
    try:
        raw.decode()
    except UnicodeDecodeError as broken:
        return invalid(f"the body is not valid UTF-8: {broken.reason} at byte {broken.start}")
    if not isinstance(error, msgspec.ValidationError):
        return invalid(f"the body is not a valid JSON object: {error}")
    found = _WHERE.fullmatch(str(error))
    message, where = (found[1], found[2] or "") if found else (str(error), "")
    if field := _FIELD.fullmatch(message):
        name = f"{where}.{field[2]}" if where else field[2]
        unknown = field[1] == "contains unknown"
        return invalid(f"unknown parameter {name!r}" if unknown else f"{name} is required", name)
    if not where:
        return invalid(f"the body is not a valid JSON object: {message}")
    return invalid(f"{where}: {message[0].lower()}{message[1:].replace('`', '')}", where)
