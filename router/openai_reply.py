"""The bytes of OpenAI answers: whole bodies, stream chunks, errors.

Owns: the JSON of every answer. Chunks are composed by hand around what changes, since one is made per token.
Must not: write to a connection, or decide when a stream starts or ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lanewise.errors import LanewiseError, Retry
from lanewise.request import Token
from lanewise.router.generation import Delta, Ended, Generation
from lanewise.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_LOWEST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON cannot

encode = _json = msgspec.json.encode


def error_body(error: LanewiseError) -> bytes:
    detail = {"message": error.message, "type": error.transport.openai_type, "param": error.param, "code": error.code}
    return _json({"error": detail})


def error_headers(error: LanewiseError) -> dict[str, str]:
    """`x-should-retry` stops clients that retry by themselves."""
    headers: dict[str, str] = {}
    if error.transport.retry is Retry.NO:
        headers["x-should-retry"] = "false"
    elif error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after_s * 1000)))
    return headers


def usage_of(ends: Sequence[Ended], prompt_tokens: int) -> dict[str, Any]:
    """A prompt counts once, however many choices it has."""
    completion_tokens = sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": max((end.cached_tokens for end in ends), default=0)},
    }


@dataclass(slots=True)
class _Collected:
    text: str = ""
    tokens: list[Token] = field(default_factory=list)


class Reply:
    """Answers one request; `chat` decides between the two dialects."""

    def __init__(self, generation: Generation, *, chat: bool, logprobs: bool, usage_chunk: bool) -> None:
        self._generation = generation
        self._tokenizer = generation.model.tokenizer
        self._chat = chat
        self._logprobs = logprobs
        self._usage_chunk = usage_chunk
        self._offsets: dict[int, int] = {}  # of the next token's text, by choice
        self._opened: set[int] = set()  # chat choices whose role has been told
        self._ends: list[Ended] = []
        self._collected: dict[int, _Collected] = {}
        self.id = f"chatcmpl-{generation.id}" if chat else f"cmpl-{generation.id}"
        self._head = self._make_head()
        self._tail = b',"usage":null}\n\n' if usage_chunk else b"}\n\n"

    # ------------------------------------------------------------ streaming

    def chunk(self, event: Delta | Ended) -> bytes:
        """The chunk of one event; empty when there is nothing to tell."""
        if isinstance(event, Ended):
            self._ends.append(event)
            end = self._choice_chunk(event.choice, b"", b"null", _json(event.reason.value), event.stop_reason)
            return self._role_chunk(event.choice) + end
        if not event.text and not (self._logprobs and event.tokens):
            return b""
        logprobs = self._logprobs_json(event.choice, event.tokens) if self._logprobs else b"null"
        text = _json(event.text)
        if not self._chat:
            return self._choice_chunk(event.choice, text, logprobs, b"null")
        content = self._choice_chunk(event.choice, b'{"content":' + text + b"}", logprobs, b"null")
        return self._role_chunk(event.choice) + content

    def last(self) -> bytes:
        """What ends a complete stream."""
        if not self._usage_chunk:
            return DONE
        usage = _json(usage_of(self._ends, self._generation.prompt_tokens))
        return b'%s"choices":[],"usage":%s}\n\n%s' % (self._head, usage, DONE)

    def _make_head(self) -> bytes:
        kind = b"chat.completion.chunk" if self._chat else b"text_completion"
        model = _json(self._generation.model.name)
        return b'data: {"id":"%s","object":"%s","created":%d,"model":%s,' % (
            self.id.encode(),
            kind,
            self._generation.created,
            model,
        )

    def _role_chunk(self, choice: int) -> bytes:
        """A chat choice opens with its role, in the same write as its first text."""
        if not self._chat or choice in self._opened:
            return b""
        self._opened.add(choice)
        return self._choice_chunk(choice, b'{"role":"assistant","content":""}', b"null", b"null")

    def _choice_chunk(
        self, choice: int, payload: bytes, logprobs: bytes, finish: bytes, stop_reason: str = ""
    ) -> bytes:
        """`payload`: the delta object (chat) or the text (completions); empty for a chunk that only ends."""
        content = (b'"delta":' + (payload or b"{}")) if self._chat else (b'"text":' + (payload or b'""'))
        extra = b',"stop_reason":' + _json(stop_reason) if stop_reason else b""
        return b'%s"choices":[{"index":%d,%s,"logprobs":%s,"finish_reason":%s%s}]%s' % (
            self._head,
            choice,
            content,
            logprobs,
            finish,
            extra,
            self._tail,
        )

    # ------------------------------------------------------------ whole

    def collect(self, event: Delta | Ended) -> None:
        if isinstance(event, Ended):
            self._ends.append(event)
            return
        collected = self._collected.setdefault(event.choice, _Collected())
        collected.text += event.text
        if self._logprobs:
            collected.tokens += event.tokens

    def whole(self) -> bytes:
        choices = []
        for end in sorted(self._ends, key=lambda end: end.choice):
            collected = self._collected.get(end.choice, _Collected())
            logprobs = msgspec.Raw(self._logprobs_json(end.choice, collected.tokens)) if self._logprobs else None
            choice: dict[str, Any] = {"index": end.choice, "logprobs": logprobs, "finish_reason": end.reason.value}
            if end.stop_reason:
                choice["stop_reason"] = end.stop_reason
            if self._chat:
                choice["message"] = {"role": "assistant", "content": collected.text, "refusal": None}
            else:
                choice["text"] = collected.text
            choices.append(choice)
        body = {
            "id": self.id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": self._generation.created,
            "model": self._generation.model.name,
            "choices": choices,
            "usage": usage_of(self._ends, self._generation.prompt_tokens),
        }
        return _json(body)

    # ------------------------------------------------------------ logprobs

    def _logprobs_json(self, choice: int, tokens: Sequence[Token]) -> bytes:
        if self._chat:
            return _json({"content": [_chat_logprob(self._tokenizer, token) for token in tokens], "refusal": None})
        text = self._tokenizer.token_text
        texts = [text(token.token_id) for token in tokens]
        offset = self._offsets.get(choice, 0)
        offsets = []
        for piece in texts:
            offsets.append(offset)
            offset += len(piece)
        self._offsets[choice] = offset
        tops = [{text(i): _finite(p) for i, p in (*token.top, (token.token_id, token.logprob))} for token in tokens]
        values = [_finite(token.logprob) for token in tokens]
        return _json({"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets})


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST_LOGPROB)


def _chat_logprob(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    return {
        **_one(tokenizer, token.token_id, token.logprob),
        "top_logprobs": [_one(tokenizer, token_id, logprob) for token_id, logprob in token.top],
    }


def _one(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}
