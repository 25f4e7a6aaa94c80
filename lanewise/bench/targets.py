"""The endpoints a benchmark can ask: OpenAI over HTTP with server-sent events, Lanewise over gRPC.

Owns: one request from the first byte sent to the last event, with the time of every event; failures by kind.
Must not: schedule, retry or count. A request never raises: whatever happens is in its Answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import aiohttp

from lanewise.client import AsyncClient, Delta, Finished
from lanewise.errors import ConfigError, LanewiseError


@dataclass(slots=True)
class Answer:
    """What came back, by the client's monotonic clock."""

    sent_s: float
    event_s: list[float] = field(default_factory=list)  # events that brought text or tokens
    first_choice_s: float | None = None  # the first event of any kind about the answer
    end_s: float = 0.0
    prompt_tokens: int | None = None  # as the server counted
    output_tokens: int | None = None
    finish: str = ""
    error: str | None = None  # kind, few different values
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """The same for every request."""

    model: str | None
    temperature: float
    ignore_eos: bool
    timeout_s: float
    api_key: str | None = None


Prompt = list[int] | str


class Target(Protocol):
    async def ask(self, prompt: Prompt, output_tokens: int, settings: Settings) -> Answer: ...
    async def models(self) -> list[str]: ...
    async def close(self) -> None: ...


def connect(url: str, settings: Settings) -> Target:
    """The target of a URL; needs a running event loop."""
    scheme = url.partition("://")[0]
    if scheme in ("grpc", "grpcs"):
        try:
            return GrpcTarget(url, settings.api_key)
        except LanewiseError as error:
            raise ConfigError(error.message) from error
    if scheme in ("http", "https"):
        return OpenAiTarget(url, settings.api_key)
    raise ConfigError(f"expected http://HOST:PORT/v1 or grpc://HOST:PORT, got {url!r}")


class OpenAiTarget:
    """`POST {base}/completions`, streamed."""

    def __init__(self, url: str, api_key: str | None) -> None:
        base = url.rstrip("/")
        self._base = base if base.rpartition("/")[2] == "v1" else base + "/v1"
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)

    async def close(self) -> None:
        await self._session.close()

    async def models(self) -> list[str]:
        try:
            async with self._session.get(f"{self._base}/models") as response:
                body = await response.json(content_type=None)
                return [str(model["id"]) for model in body["data"]]
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"no answer from {self._base}/models: {error or type(error).__name__}") from error

    async def ask(self, prompt: Prompt, output_tokens: int, settings: Settings) -> Answer:
        body: dict[str, Any] = {
            "model": settings.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": settings.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.ignore_eos:
            body["ignore_eos"] = True
        timeout = aiohttp.ClientTimeout(total=settings.timeout_s, sock_connect=30)
        data = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        answer = Answer(perf_counter())
        try:
            url = f"{self._base}/completions"
            async with self._session.post(url, data=data, headers=headers, timeout=timeout) as response:
                if response.status != 200:
                    text = await response.text(errors="replace")
                    answer.error, answer.detail = _http_error(response.status, text)
                else:
                    await _read_events(response.content, answer)
        except TimeoutError:
            answer.error, answer.detail = "timeout", f"no end within {settings.timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            answer.error, answer.detail = "connect", str(error)
        except (aiohttp.ClientError, OSError) as error:
            answer.error, answer.detail = "connection lost", str(error) or type(error).__name__
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            answer.error, answer.detail = "bad event", f"{type(error).__name__}: {error}"
        answer.end_s = perf_counter()
        return answer


async def _read_events(stream: aiohttp.StreamReader, answer: Answer) -> None:
    """Every event gets the time at which its first bytes were read, before any of it is parsed."""
    parser = SseParser()
    while True:
        chunk = await stream.readany()
        now = perf_counter()
        if not chunk:
            break
        for data in parser.feed(chunk):
            if data == b"[DONE]":
                if not answer.event_s and answer.first_choice_s:
                    # Tokens without any text (such as half a character): the first sign of them is what a user saw.
                    answer.event_s.append(answer.first_choice_s)
                return
            _take_event(json.loads(data), now, answer)
            if answer.error:
                return
    if not answer.finish and not answer.error:
        answer.error, answer.detail = "stream cut", f"ended after {len(answer.event_s)} events without a finish reason"


def _take_event(event: dict[str, Any], now: float, answer: Answer) -> None:
    if event.get("error"):
        answer.error, answer.detail = _error_body(event, "error event")
        return
    for choice in event.get("choices") or ():
        # An event may bring only the finish reason: that is no token.
        if choice.get("text") or choice.get("token_ids"):
            answer.event_s.append(now)
        answer.first_choice_s = answer.first_choice_s or now
        answer.finish = choice.get("finish_reason") or answer.finish
    usage = event.get("usage")
    if usage:
        answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _http_error(status: int, text: str) -> tuple[str, str]:
    try:
        return _error_body(json.loads(text), f"HTTP {status}", f"HTTP {status} ")
    except (ValueError, AttributeError):
        return f"HTTP {status}", text[:200]


def _error_body(body: dict[str, Any], fallback: str, prefix: str = "") -> tuple[str, str]:
    error = body.get("error")
    if not isinstance(error, dict):
        return fallback, str(error or body.get("message", ""))[:200]
    kind = error.get("code") or error.get("type")
    return f"{prefix}{kind}" if kind else fallback, str(error.get("message", ""))[:200]


class SseParser:
    """Server-sent events out of chunks cut anywhere: yields the data of each complete event."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                    self._data.clear()
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            # Everything else (comments that keep the connection alive, event names, ids) carries no token.


class GrpcTarget:
    """`lanewise.v1.Inference/Generate`."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._client = AsyncClient(url, api_key=api_key)

    async def close(self) -> None:
        await self._client.close()

    async def models(self) -> list[str]:
        try:
            return [model.id for model in await self._client.list_models()]
        except LanewiseError as error:
            raise ConfigError(error.message) from error

    async def ask(self, prompt: Prompt, output_tokens: int, settings: Settings) -> Answer:
        answer = Answer(perf_counter())
        events = self._client.generate(
            prompt,
            model=settings.model or "",
            max_tokens=output_tokens,
            temperature=settings.temperature,
            ignore_eos=settings.ignore_eos,
            timeout_s=settings.timeout_s,
        )
        try:
            async with aclosing(events) as stream:  # type: ignore[type-var]
                async for event in stream:
                    now = perf_counter()
                    if isinstance(event, Delta) and (event.token_ids or event.text):
                        answer.event_s.append(now)
                    elif isinstance(event, Finished):
                        usage = event.usage
                        answer.prompt_tokens, answer.output_tokens = usage.prompt_tokens, usage.completion_tokens
                        answer.finish = event.reason
        except LanewiseError as error:
            answer.error, answer.detail = str(error.code), error.message
        answer.end_s = perf_counter()
        return answer
