"""The public gRPC API.

Owns: `Inference`, and the mapping of LanewiseError to status and trailing metadata.
Must not: know workers beyond repeating what they said of themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.message import DecodeError

from lanewise.errors import ErrorCode, LanewiseError, Retry, invalid
from lanewise.router.auth import ApiKeys
from lanewise.router.catalog import Catalog
from lanewise.router.dispatch import Dispatcher
from lanewise.router.generation import Delta, Ended, Event, Front, Generation
from lanewise.router.sampling import Chat, GenerationRequest, Options, Prompt
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "logprobs",
)


def add_inference(service: InferenceService, server: grpc.aio.Server) -> None:
    """As the generated registration does it, but a message that is no protobuf is the client's fault, not UNKNOWN."""
    kinds: dict[str, tuple[Any, Any, Any]] = {
        "Generate": (grpc.unary_stream_rpc_method_handler, pb.GenerateRequest, pb.GenerateEvent),
        "Explain": (grpc.unary_unary_rpc_method_handler, pb.ExplainRequest, pb.ExplainReply),
        "ListModels": (grpc.unary_unary_rpc_method_handler, pb.ListModelsRequest, pb.ListModelsReply),
    }
    handlers: dict[str, Any] = {
        name: make(_readable(getattr(service, name), request), None, reply.SerializeToString)
        for name, (make, request, reply) in kinds.items()
    }
    full_name = pb.DESCRIPTOR.services_by_name["Inference"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(full_name, handlers),))


def _readable(serve: Callable[[Any, Context], Awaitable[Any]], kind: Any) -> Callable[[bytes, Context], Awaitable[Any]]:
    async def parsed(raw: bytes, context: Context) -> Any:
        try:
            request = kind.FromString(raw)
        except DecodeError as error:
            await abort(context, invalid(f"the message is not a {kind.DESCRIPTOR.name}: {error}"))
        return await serve(request, context)

    return parsed


def request_from_wire(wire: pb.GenerateRequest, timeout_s: float | None, salt: bytes) -> GenerationRequest:
    """Raises INVALID_REQUEST where there is no prompt."""
    prompt: Prompt
    match wire.WhichOneof("prompt"):
        case "text":
            prompt = wire.text
        case "token_ids":
            prompt = tuple(wire.token_ids.ids)
        case "chat":
            if not wire.chat.messages:
                raise invalid("a chat needs at least one message", "chat.messages")
            prompt = Chat(tuple({"role": m.role, "content": m.content} for m in wire.chat.messages))
        case _:
            raise invalid("one of text, token_ids and chat is required", "prompt")
    sampling = wire.sampling
    given = {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}
    return GenerationRequest(
        model=wire.model,
        prompts=(prompt,),
        options=Options(
            **given,
            logit_bias=dict(sampling.logit_bias),
            stop_token_ids=tuple(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
        ),
        stop=tuple(wire.stop),
        n=wire.n or 1,
        ttft_target_s=wire.ttft_target_ms / 1000 if wire.HasField("ttft_target_ms") else None,
        timeout_s=timeout_s,
        tenant_salt=salt,
    )


def error_detail(error: LanewiseError) -> pb.ErrorDetail:
    return pb.ErrorDetail(
        code=error.code.value,
        message=error.message,
        param=error.param or "",
        retry_after_ms=round((error.retry_after_s or 0) * 1000),
        should_retry=error.transport.retry is not Retry.NO,
    )


def trailers(error: LanewiseError) -> tuple[tuple[str, str], ...]:
    out = [
        ("lanewise-code", error.code.value),
        ("x-should-retry", "false" if error.transport.retry is Retry.NO else "true"),
    ]
    if error.retry_after_s is not None:
        out.append(("retry-after-ms", str(round(error.retry_after_s * 1000))))
    return tuple(out)


async def abort(context: Context, error: LanewiseError) -> NoReturn:
    await context.abort(grpc.StatusCode[error.transport.grpc], error.message, trailers(error))
    raise AssertionError("abort raises")


class _Stream:
    """Events of one Generate call, with the ids that a delta without text leaves for the next one."""

    def __init__(self, generation: Generation, logprobs: bool) -> None:
        self._tokenizer = generation.model.tokenizer
        self._logprobs = logprobs
        self._ids: dict[int, list[int]] = {}

    def message(self, event: Event) -> pb.GenerateEvent | None:
        if isinstance(event, Ended):
            return pb.GenerateEvent(finished=_finished(event))
        ids = self._ids.setdefault(event.choice, [])
        ids += (token.token_id for token in event.tokens)
        if not event.text and not self._logprobs:
            return None
        del self._ids[event.choice]
        delta = pb.TextDelta(choice=event.choice, text=event.text, token_ids=ids)
        if self._logprobs:
            self._add_logprobs(delta, event)
        return pb.GenerateEvent(delta=delta)

    def rest(self, choice: int) -> pb.GenerateEvent | None:
        """Ids that had no text and that no delta carried yet: an end-of-sequence id, typically."""
        ids = self._ids.pop(choice, None)
        return pb.GenerateEvent(delta=pb.TextDelta(choice=choice, token_ids=ids)) if ids else None

    def _add_logprobs(self, delta: pb.TextDelta, event: Delta) -> None:
        text = self._tokenizer.token_text
        for token in event.tokens:
            entry = delta.logprobs.add(token_id=token.token_id, text=text(token.token_id), logprob=token.logprob or 0.0)
            for token_id, logprob in token.top:
                entry.top.add(token_id=token_id, text=text(token_id), logprob=logprob)


def _finished(event: Ended) -> pb.Finished:
    usage = pb.Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        cached_tokens=event.cached_tokens,
    )
    error = error_detail(event.error) if event.error is not None else None
    return pb.Finished(
        choice=event.choice, reason=event.reason.value, error=error, usage=usage, stop_reason=event.stop_reason
    )


class InferenceService(pb_grpc.InferenceServicer):
    def __init__(self, front: Front, catalog: Catalog, dispatcher: Dispatcher, keys: ApiKeys) -> None:
        self._front = front
        self._catalog = catalog
        self._dispatcher = dispatcher
        self._keys = keys

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        started = time.monotonic()
        request_id, outcome = "", "CANCELLED"
        try:
            salt = self._authorize(context)
            task = asyncio.current_task()
            assert task is not None  # grpc.aio runs each call in a task
            wanted = request_from_wire(request, context.time_remaining(), salt)
            generation = await self._front.generate(wanted, on_stall=lambda: _cancel(task))
            request_id = generation.id
            try:
                outcome = await self._relay(request, context, generation)
            finally:
                generation.close()
        except LanewiseError as error:
            outcome = error.code
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            outcome = ErrorCode.INTERNAL
            log.exception("grpc_defect", request_id=request_id)
            await abort(context, LanewiseError(ErrorCode.INTERNAL, "internal error; the router's log has the details"))
        finally:
            log.info(
                "grpc",
                method="Generate",
                outcome=outcome,
                duration_ms=round((time.monotonic() - started) * 1000, 2),
                request_id=request_id,
                client_request_id=request.client_request_id,
            )

    async def _relay(self, request: pb.GenerateRequest, context: Context, generation: Generation) -> str:
        """Write everything that happens. Raises what ends all of it before anything was written."""
        stream = _Stream(generation, logprobs=request.sampling.HasField("logprobs"))
        outcome = "ok"
        begun = False
        while not generation.done:
            for event in await generation.next():
                failed = isinstance(event, Ended) and event.error is not None
                if not begun:
                    if isinstance(event, Ended) and event.error is not None and generation.num_choices == 1:
                        raise event.error
                    begun = True
                    await context.write(pb.GenerateEvent(accepted=_accepted(request, generation)))
                if isinstance(event, Ended):
                    if (rest := stream.rest(event.choice)) is not None:
                        await context.write(rest)
                    outcome = event.error.code if failed and event.error is not None else outcome
                if (message := stream.message(event)) is not None:
                    await context.write(message)
        return outcome

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainReply:
        await self._authorized(context)
        request_id = request.request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        trail = self._dispatcher.explain(request_id)
        if trail is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no request {request_id!r} among the recent ones")
            raise AssertionError("abort raises")
        reply = pb.ExplainReply(request_id=request_id)
        for at, epoch, what, detail in trail.steps:
            reply.steps.add(at_ms=(at - trail.started_at) * 1000, epoch=epoch, what=what, detail=detail)
        return reply

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsReply:
        await self._authorized(context)
        reply = pb.ListModelsReply()
        for model in self._catalog.models():
            reply.models.add(id=model.name, max_context_tokens=model.max_context_tokens)
        return reply

    async def _authorized(self, context: Context) -> None:
        try:
            self._authorize(context)
        except LanewiseError as error:
            await abort(context, error)

    def _authorize(self, context: Context) -> bytes:
        metadata = context.invocation_metadata() or ()
        value = next((value for key, value in metadata if key == "authorization"), None)
        return self._keys.check(value.decode() if isinstance(value, bytes) else value)


def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel("the client took nothing for too long")


def _accepted(request: pb.GenerateRequest, generation: Generation) -> pb.Accepted:
    return pb.Accepted(
        request_id=generation.id,
        client_request_id=request.client_request_id,
        prompt_tokens=generation.prompt_tokens,
    )
