"""What the client says and hears, as plain Python values, and the way to and from protobuf.

Owns: options, events, addresses and the typed error behind each gRPC failure.
Must not: open a channel (client.py does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

from lanewise.errors import TRANSPORT, ErrorCode, LanewiseError, invalid
from lanewise.rpc import lanewise_pb2 as pb

DEFAULT_ADDRESS = "127.0.0.1:50051"

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages with `role` and `content`."""


class Options(TypedDict):
    """What may be said about a generation; everything else is the server's default."""

    model: NotRequired[str]  # may be omitted where the server has one model
    max_tokens: NotRequired[int]
    temperature: NotRequired[float]
    top_p: NotRequired[float]
    top_k: NotRequired[int]
    min_p: NotRequired[float]
    presence_penalty: NotRequired[float]
    frequency_penalty: NotRequired[float]
    repetition_penalty: NotRequired[float]
    logit_bias: NotRequired[Mapping[int, float]]
    seed: NotRequired[int]
    min_tokens: NotRequired[int]
    stop_token_ids: NotRequired[Sequence[int]]
    ignore_eos: NotRequired[bool]
    logprobs: NotRequired[int]
    stop: NotRequired[Sequence[str]]
    n: NotRequired[int]
    client_request_id: NotRequired[str]
    ttft_target_s: NotRequired[float]
    timeout_s: NotRequired[float]  # hard deadline of the whole request


@dataclass(frozen=True, slots=True)
class Accepted:
    request_id: str  # the router's own, for `explain`
    client_request_id: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice; every choice has exactly one."""

    choice: int
    reason: str  # stop, length, cancelled, error
    usage: Usage
    stop_reason: str = ""  # the stop string that matched
    error: LanewiseError | None = None


Event = Accepted | Delta | Finished


@dataclass(frozen=True, slots=True)
class ModelInfo:
    id: str
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class ExplainStep:
    at_ms: float
    epoch: int
    what: str
    detail: str


class Outcome:
    """How a stream ended: the first choice that failed, or that no choice ever finished."""

    def __init__(self) -> None:
        self._error: LanewiseError | None = None
        self._finished = False

    def note(self, event: Event) -> Event:
        if isinstance(event, Finished):
            self._finished = True
            self._error = self._error or event.error
        return event

    def check(self) -> None:
        """Called at the end of the stream; an answer that just stops is never taken for a whole one."""
        if self._error is not None:
            raise self._error
        if not self._finished:
            raise LanewiseError(ErrorCode.INTERNAL, "the stream ended before the answer was finished")


def parse_address(address: str) -> tuple[str, bool]:
    """(host:port, TLS) of `host:port`, `grpc://host:port` or `grpcs://host:port`."""
    scheme, mark, rest = address.rpartition("://")
    target = rest.rstrip("/")
    if scheme in ("http", "https"):
        raise invalid(f"{address} is an OpenAI address; expected the router's gRPC address such as {DEFAULT_ADDRESS}")
    if (mark and scheme not in ("grpc", "grpcs")) or not target.rpartition(":")[2].isdigit() or "/" in target:
        raise invalid(f"expected a gRPC address such as {DEFAULT_ADDRESS} or grpc://host:port, got {address!r}")
    return target, scheme == "grpcs"


def make_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if not isinstance(prompt, str) and len(prompt) == 0:
        raise invalid("the prompt is empty", "prompt")
    try:
        if isinstance(prompt, str):
            request.text = prompt
        elif all(isinstance(part, int) for part in prompt):
            request.token_ids.ids.extend(cast("Sequence[int]", prompt))
        else:
            request.chat.messages.extend(
                pb.ChatMessage(**message) for message in cast("Sequence[Mapping[str, str]]", prompt)
            )
        for name in ("model", "n", "client_request_id"):
            if name in values:
                setattr(request, name, values.pop(name))
        request.stop.extend(values.pop("stop", ()))
        if "ttft_target_s" in values:
            request.ttft_target_ms = round(values.pop("ttft_target_s") * 1000)
        request.sampling.CopyFrom(pb.SamplingOptions(**values))
    except (TypeError, ValueError) as error:
        raise invalid(f"bad request: {error}") from error
    return request


def to_event(message: pb.GenerateEvent) -> Event:
    kind = message.WhichOneof("event")
    if kind == "accepted":
        accepted = message.accepted
        return Accepted(accepted.request_id, accepted.client_request_id, accepted.prompt_tokens)
    if kind == "delta":
        delta = message.delta
        logprobs = tuple(_logprob(entry) for entry in delta.logprobs)
        return Delta(delta.choice, delta.text, tuple(delta.token_ids), logprobs)
    if kind == "finished":
        done = message.finished
        usage = Usage(done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.cached_tokens)
        error = _detail(done.error) if done.HasField("error") else None
        return Finished(done.choice, done.reason, usage, done.stop_reason, error)
    raise LanewiseError(ErrorCode.INTERNAL, "the server sent an event this client does not know; is it newer?")


def to_steps(reply: pb.ExplainReply) -> list[ExplainStep]:
    return [ExplainStep(step.at_ms, step.epoch, step.what, step.detail) for step in reply.steps]


def to_error(error: Any, address: str) -> LanewiseError:
    """Our own code from the trailing metadata; else the nearest to the gRPC status."""
    trailing = {str(key): value for key, value in (error.trailing_metadata() or ())}
    name = _text(trailing.get("lanewise-code", ""))
    retry_ms = _text(trailing.get("retry-after-ms", ""))
    message = error.details() or error.code().name
    if name in ErrorCode.__members__:
        code = ErrorCode[name]
    else:
        grpc_name = error.code().name
        code = next((code for code, row in TRANSPORT.items() if row.grpc == grpc_name), ErrorCode.INTERNAL)
        if grpc_name == "UNAVAILABLE":
            code, message = ErrorCode.NO_WORKERS, f"cannot reach {address}: {message}"
    retry_after_s = int(retry_ms) / 1000 if retry_ms.isdigit() else None
    return LanewiseError(
        code, message, param=_text(trailing.get("lanewise-param", "")) or None, retry_after_s=retry_after_s
    )


def _detail(detail: pb.ErrorDetail) -> LanewiseError:
    code = ErrorCode[detail.code] if detail.code in ErrorCode.__members__ else ErrorCode.INTERNAL
    retry_after_s = detail.retry_after_ms / 1000 if detail.retry_after_ms else None
    return LanewiseError(code, detail.message, param=detail.param or None, retry_after_s=retry_after_s)


def _logprob(entry: pb.TokenLogprob) -> TokenLogprob:
    top = tuple((one.token_id, one.text, one.logprob) for one in entry.top)
    return TokenLogprob(entry.token_id, entry.text, entry.logprob, top)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
