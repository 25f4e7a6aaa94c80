"""The Python client: `Client` and `AsyncClient` over the public gRPC interface of a router.

Owns: channels and calls; every failure leaves here as a `LanewiseError`. Requests and events are in client_wire.py.
Must not: import anything of Lanewise but rpc, errors and request; retry by itself (the error says whether one may).

    with Client("127.0.0.1:50051") as client:
        for text in client.generate_text("Once upon a time", max_tokens=64):
            print(text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from lanewise.client_wire import (
    DEFAULT_ADDRESS,
    Accepted,
    Delta,
    Event,
    ExplainStep,
    Finished,
    ModelInfo,
    Options,
    Outcome,
    Prompt,
    TokenLogprob,
    Usage,
    make_request,
    parse_address,
    to_error,
    to_event,
    to_steps,
)
from lanewise.errors import LanewiseError
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as stubs

__all__ = [
    "Accepted",
    "AsyncClient",
    "Client",
    "Delta",
    "Event",
    "ExplainStep",
    "Finished",
    "LanewiseError",
    "ModelInfo",
    "Options",
    "Prompt",
    "TokenLogprob",
    "Usage",
]

MAX_MESSAGE_BYTES = 64 << 20
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.enable_retries", 0),  # a retry is the caller's decision
)


class Client:
    """Blocking client. Safe to share between threads; leaving an iterator early cancels its request."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, api_key: str | None = None) -> None:
        target, secure = parse_address(address)
        self.address = target
        self._metadata = _metadata(api_key)
        if secure:
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._stub = stubs.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Event]:
        """Events of one request. A choice that ended in an error is yielded first and raised after the last event."""
        timeout_s = options.pop("timeout_s", None)
        call = self._stub.Generate(make_request(prompt, options), timeout=timeout_s, metadata=self._metadata)
        outcome = Outcome()
        try:
            for message in call:
                yield outcome.note(to_event(message))
        except grpc.RpcError as error:
            raise to_error(error, self.address) from error
        finally:
            call.cancel()
        outcome.check()

    def generate_text(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[str]:
        """The text of the first choice, in pieces as they come."""
        for event in self.generate(prompt, **options):
            if isinstance(event, Delta) and event.choice == 0 and event.text:
                yield event.text

    def list_models(self, timeout_s: float = 10.0) -> list[ModelInfo]:
        reply = self._unary(self._stub.ListModels, pb.ListModelsRequest(), timeout_s)
        return [ModelInfo(model.id, model.max_context_tokens) for model in reply.models]

    def explain(self, request_id: str, timeout_s: float = 10.0) -> list[ExplainStep]:
        """What became of a recent request, step by step."""
        return to_steps(self._unary(self._stub.Explain, pb.ExplainRequest(request_id=request_id), timeout_s))

    def _unary(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error, self.address) from error


class AsyncClient:
    """The same on asyncio. Belongs to the event loop it was made in."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, api_key: str | None = None) -> None:
        target, secure = parse_address(address)
        self.address = target
        self._metadata = _metadata(api_key)
        if secure:
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.aio.secure_channel(target, credentials, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._stub = stubs.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[Event]:
        """As `Client.generate`. Wrap it in `contextlib.aclosing` where the loop may be left early."""
        timeout_s = options.pop("timeout_s", None)
        call = self._stub.Generate(make_request(prompt, options), timeout=timeout_s, metadata=self._metadata)
        outcome = Outcome()
        try:
            async for message in call:
                yield outcome.note(to_event(message))
        except grpc.RpcError as error:
            raise to_error(error, self.address) from error
        finally:
            call.cancel()
        outcome.check()

    async def generate_text(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[str]:
        async for event in self.generate(prompt, **options):
            if isinstance(event, Delta) and event.choice == 0 and event.text:
                yield event.text

    async def list_models(self, timeout_s: float = 10.0) -> list[ModelInfo]:
        reply = await self._unary(self._stub.ListModels, pb.ListModelsRequest(), timeout_s)
        return [ModelInfo(model.id, model.max_context_tokens) for model in reply.models]

    async def explain(self, request_id: str, timeout_s: float = 10.0) -> list[ExplainStep]:
        return to_steps(await self._unary(self._stub.Explain, pb.ExplainRequest(request_id=request_id), timeout_s))

    async def _unary(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error, self.address) from error


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()
