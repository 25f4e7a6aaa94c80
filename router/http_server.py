"""The OpenAI HTTP API, health and metrics.

Owns: the routes, reading requests, writing answers and streams. Must not: know workers, or map errors (http_calls.py).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from aiohttp import web

from lanewise.config import RouterConfig
from lanewise.errors import ErrorCode, LanewiseError, invalid
from lanewise.router import openai_reply as reply
from lanewise.router import openai_request as api
from lanewise.router.auth import ApiKeys
from lanewise.router.catalog import Catalog, Model
from lanewise.router.dispatch import Dispatcher
from lanewise.router.generation import Ended, Event, Front, Generation
from lanewise.router.http_calls import Call, Calls, headers_of, json_response
from lanewise.router.metrics import RouterMetrics
from lanewise.router.sampling import GenerationRequest

BODY_S = 60.0  # a body that has not arrived by then is given up
# A stream's status is not sent before its first event, so that an error keeps its status: longer than the default
# hold_timeout, and shorter than the 60 s after which proxies commonly give up on a silent server.
FIRST_KEEP_ALIVE_S = 40.0
KEEP_ALIVE_S = 15.0


class HttpServer:
    def __init__(
        self,
        config: RouterConfig,
        front: Front,
        catalog: Catalog,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        keys: ApiKeys,
    ) -> None:
        self._config = config
        self._front = front
        self._catalog = catalog
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._keys = keys
        self._calls = Calls(metrics)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self._config.max_body_bytes)
        app.router.add_post("/v1/completions", self._calls.serve(self._completions))
        app.router.add_post("/v1/chat/completions", self._calls.serve(self._chat))
        app.router.add_get("/v1/models", self._calls.serve(self._models))
        app.router.add_get("/v1/models/{name:.+}", self._calls.serve(self._model))
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_route("*", "/{path:.*}", self._calls.serve(self._nothing))
        return app

    @property
    def ready(self) -> bool:
        """Stays true while workers are away: requests are held for them."""
        return self._dispatcher.routable and not self._front.draining

    # ------------------------------------------------------------ generation

    async def _completions(self, request: web.Request, call: Call) -> web.StreamResponse:
        salt = self._keys.check(request.headers.get("Authorization"))
        body = api.parse_completion(await self._body(request))
        wanted = self._with_headers(request, api.completion_request(body), salt)
        return await self._generate(request, call, wanted, body, chat=False, logprobs=body.logprobs is not None)

    async def _chat(self, request: web.Request, call: Call) -> web.StreamResponse:
        salt = self._keys.check(request.headers.get("Authorization"))
        body = api.parse_chat(await self._body(request))
        wanted = self._with_headers(request, api.chat_request(body), salt)
        try:
            return await self._generate(request, call, wanted, body, chat=True, logprobs=bool(body.logprobs))
        except LanewiseError as error:
            if error.param == "prompt":  # which a chat client has not sent
                error.param = "messages"
            raise

    async def _generate(
        self,
        request: web.Request,
        call: Call,
        wanted: GenerationRequest,
        body: api.CompletionBody | api.ChatBody,
        *,
        chat: bool,
        logprobs: bool,
    ) -> web.StreamResponse:
        options = body.stream_options
        if options is not None and not body.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        generation = await self._front.generate(wanted, on_stall=lambda: _abort(request))
        call.request_id = generation.id
        call.prompt_tokens = generation.prompt_tokens
        try:
            usage_chunk = bool(options and options.include_usage)
            answer = reply.Reply(generation, chat=chat, logprobs=logprobs, usage_chunk=usage_chunk)
            if body.stream:
                call.stream = True
                return await self._stream(request, call, generation, answer)
            while not generation.done:
                for event in await generation.next():
                    _raise_error(event, call)
                    answer.collect(event)
            return json_response(answer.whole(), call)
        finally:
            generation.close()

    async def _stream(
        self, request: web.Request, call: Call, generation: Generation, answer: reply.Reply
    ) -> web.StreamResponse:
        events: list[Event] = []
        patience_ends = time.monotonic() + FIRST_KEEP_ALIVE_S
        while not events and (left := patience_ends - time.monotonic()) > 0:
            events = await generation.next(left)
        for event in events:
            if isinstance(event, Ended) and event.error is not None:
                raise event.error
        response = web.StreamResponse(headers=headers_of(call))
        response.content_type = "text/event-stream"
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        await response.prepare(request)
        try:
            while True:
                data = bytearray()
                for event in events:
                    _raise_error(event, call)
                    data += answer.chunk(event)
                if generation.done:
                    data += answer.last()
                    break
                if data:
                    await response.write(data)
                events = await generation.next(KEEP_ALIVE_S)
                if not events:
                    await response.write(reply.KEEP_ALIVE)
        except LanewiseError as error:  # the status is out: an error event, then the end, never a silent end
            call.error = error.code
            data += b"data: " + reply.error_body(error) + b"\n\n"
        # While tokens wait, the outbox notices a client that takes nothing; nothing waits behind the last bytes.
        try:
            async with asyncio.timeout(self._config.client_stall_s):
                await response.write(data)
                await response.write_eof()
        except TimeoutError:
            _abort(request)
        return response

    def _with_headers(self, request: web.Request, wanted: GenerationRequest, salt: bytes) -> GenerationRequest:
        target = request.headers.get("x-slo-ttft-ms")
        if target is None:
            return replace(wanted, tenant_salt=salt) if salt else wanted
        try:
            target_s = float(target) / 1000
        except ValueError:
            raise invalid("x-slo-ttft-ms must be a number of milliseconds", "x-slo-ttft-ms") from None
        return replace(wanted, tenant_salt=salt, ttft_target_s=target_s)

    async def _body(self, request: web.Request) -> bytes:
        limit = self._config.max_body_bytes
        too_large = LanewiseError(ErrorCode.PAYLOAD_TOO_LARGE, f"the body is larger than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        try:
            if request.content.is_eof():  # it came with the head, as most do
                return await request.read()
            async with asyncio.timeout(BODY_S):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise too_large from None
        except TimeoutError:
            raise invalid(f"the body did not arrive within {BODY_S:g} s") from None

    # ------------------------------------------------------------ the rest

    async def _models(self, request: web.Request, call: Call) -> web.StreamResponse:
        self._keys.check(request.headers.get("Authorization"))
        body = {"object": "list", "data": [_model_card(model) for model in self._catalog.models()]}
        return json_response(reply.encode(body), call)

    async def _model(self, request: web.Request, call: Call) -> web.StreamResponse:
        self._keys.check(request.headers.get("Authorization"))
        return json_response(reply.encode(_model_card(self._catalog.get(request.match_info["name"]))), call)

    async def _nothing(self, request: web.Request, call: Call) -> web.StreamResponse:
        known = {resource.canonical for resource in request.app.router.resources()}
        status = 405 if request.path in known else 404
        error = invalid(f"{request.method} {request.path} is not part of this API")
        return json_response(reply.error_body(error), call, status, reply.error_headers(error))

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        if self.ready:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="draining\n" if self._front.draining else "no worker pair yet\n")

    async def _scrape(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )


def _raise_error(event: Event, call: Call) -> None:
    if isinstance(event, Ended):
        call.output_tokens += event.completion_tokens
        if event.error is not None:
            raise event.error


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _model_card(model: Model) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "lanewise",
        "max_model_len": model.max_context_tokens,
    }
