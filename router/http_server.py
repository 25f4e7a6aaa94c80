"""The OpenAI HTTP API, health and metrics.

Owns: the routes, reading requests, writing answers and streams. Must not: know workers, or map errors (http_calls.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from lanewise.config import RouterConfig
from lanewise.errors import LanewiseError, invalid
from lanewise.router import openai_reply as reply
from lanewise.router import openai_request as api
from lanewise.router.auth import ApiKeys
from lanewise.router.catalog import Catalog, Model
from lanewise.router.dispatch import Dispatcher
from lanewise.router.generation import Ended, Event, Front, Generation
from lanewise.router.http_calls import Call, Calls, Serve, headers_of, reply_json
from lanewise.router.http_exchange import Exchange
from lanewise.router.metrics import RouterMetrics
from lanewise.router.sampling import GenerationRequest

# A stream's status is not sent before its first event, so that an error keeps its status: longer than the default
# hold_timeout, and shorter than the 60 s after which proxies commonly give up on a silent server.
FIRST_KEEP_ALIVE_S = 40.0
KEEP_ALIVE_S = 15.0
TEXT = "text/plain; charset=utf-8"
_NO_BUFFERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # of proxies, in front of a stream


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
        self._calls_of: dict[str, dict[str, Serve]] = {
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/models": {"GET": self._models},
        }
        self._plain: dict[str, Callable[[Exchange], None]] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._scrape,
        }

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request, whatever it is."""
        path = exchange.path
        plain = self._plain.get(path)
        if plain is not None and exchange.method in ("GET", "HEAD") and exchange.fault is None:
            plain(exchange)
            return
        methods = self._calls_of.get(path)
        if methods is None and path.startswith("/v1/models/"):
            methods = {"GET": self._model}
        await self._calls.serve((methods or {}).get(exchange.method, self._nothing), exchange)

    @property
    def ready(self) -> bool:
        """Stays true while workers are away: requests are held for them."""
        return self._dispatcher.routable and not self._front.draining

    # ------------------------------------------------------------ generation

    async def _completions(self, exchange: Exchange, call: Call) -> None:
        salt = self._keys.check(exchange.header(b"authorization"))
        body = api.parse_completion(bytes(exchange.body))
        wanted = self._with_headers(exchange, api.completion_request(body), salt)
        await self._generate(exchange, call, wanted, body, chat=False, logprobs=body.logprobs is not None)

    async def _chat(self, exchange: Exchange, call: Call) -> None:
        salt = self._keys.check(exchange.header(b"authorization"))
        body = api.parse_chat(bytes(exchange.body))
        wanted = self._with_headers(exchange, api.chat_request(body), salt)
        try:
            await self._generate(exchange, call, wanted, body, chat=True, logprobs=bool(body.logprobs))
        except LanewiseError as error:
            if error.param == "prompt":  # which a chat client has not sent
                error.param = "messages"
            raise

    async def _generate(
        self,
        exchange: Exchange,
        call: Call,
        wanted: GenerationRequest,
        body: api.CompletionBody | api.ChatBody,
        *,
        chat: bool,
        logprobs: bool,
    ) -> None:
        options = body.stream_options
        if options is not None and not body.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        if body.stream and not self._catalog.known:
            early = await self._generate_early(exchange, call, wanted)
            if early is None:
                return
            generation = early
        else:
            generation = await self._front.generate(wanted, on_stall=exchange.abort)
        call.request_id = generation.id
        call.prompt_tokens = generation.prompt_tokens
        try:
            usage_chunk = bool(options and options.include_usage)
            answer = reply.Reply(generation, chat=chat, logprobs=logprobs, usage_chunk=usage_chunk)
            if body.stream:
                call.stream = True
                await self._stream(exchange, call, generation, answer)
                return
            while not generation.done:
                for event in await generation.next():
                    _raise_error(event, call)
                    answer.collect(event)
            reply_json(exchange, call, answer.whole())
        finally:
            generation.close()

    async def _generate_early(self, exchange: Exchange, call: Call, wanted: GenerationRequest) -> Generation | None:
        """A stream that is held before this router has seen any worker. None: it has ended, with an error event."""
        waiting = asyncio.create_task(self._front.generate(wanted, on_stall=exchange.abort))
        patience_s = FIRST_KEEP_ALIVE_S
        try:
            while not (await asyncio.wait({waiting}, timeout=patience_s))[0]:
                if not exchange.status:
                    exchange.begin(200, "text/event-stream", headers_of(call) | _NO_BUFFERS)
                await exchange.write(reply.KEEP_ALIVE)
                patience_s = KEEP_ALIVE_S
            return waiting.result()
        except LanewiseError as error:
            if not exchange.status:
                raise
            call.error = error.code
            await exchange.finish(b"data: " + reply.error_body(error) + b"\n\n")
            return None
        except BaseException:  # the client is gone
            waiting.add_done_callback(_close_unwanted)
            waiting.cancel()
            raise

    async def _stream(self, exchange: Exchange, call: Call, generation: Generation, answer: reply.Reply) -> None:
        events: list[Event] = []
        patience_ends = time.monotonic() + FIRST_KEEP_ALIVE_S
        while not events and not exchange.status and (left := patience_ends - time.monotonic()) > 0:
            events = await generation.next(left)
        for event in events:
            if isinstance(event, Ended) and event.error is not None:
                raise event.error
        if not exchange.status:
            exchange.begin(200, "text/event-stream", headers_of(call) | _NO_BUFFERS)
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
                    await exchange.write(data)
                events = await generation.next(KEEP_ALIVE_S)
                if not events:
                    await exchange.write(reply.KEEP_ALIVE)
        except LanewiseError as error:  # the status is out: an error event, then the end, never a silent end
            call.error = error.code
            data += b"data: " + reply.error_body(error) + b"\n\n"
        # While tokens wait, the outbox notices a client that takes nothing; nothing waits behind the last bytes.
        try:
            async with asyncio.timeout(self._config.client_stall_s):
                await exchange.finish(data)
        except TimeoutError:
            exchange.abort()

    def _with_headers(self, exchange: Exchange, wanted: GenerationRequest, salt: bytes) -> GenerationRequest:
        target = exchange.header(b"x-slo-ttft-ms")
        if target is None:
            return replace(wanted, tenant_salt=salt) if salt else wanted
        try:
            target_s = float(target) / 1000
        except ValueError:
            raise invalid("x-slo-ttft-ms must be a number of milliseconds", "x-slo-ttft-ms") from None
        return replace(wanted, tenant_salt=salt, ttft_target_s=target_s)

    # ------------------------------------------------------------ the rest

    async def _models(self, exchange: Exchange, call: Call) -> None:
        self._keys.check(exchange.header(b"authorization"))
        cards = [_model_card(model) for model in self._catalog.models()]
        if not cards and self._catalog.expected:  # no worker has told its limits yet
            cards = [{"id": self._catalog.expected, "object": "model", "created": 0, "owned_by": "lanewise"}]
        body = {"object": "list", "data": cards}
        reply_json(exchange, call, reply.encode(body))

    async def _model(self, exchange: Exchange, call: Call) -> None:
        self._keys.check(exchange.header(b"authorization"))
        name = exchange.path.removeprefix("/v1/models/")
        reply_json(exchange, call, reply.encode(_model_card(self._catalog.get(name))))

    async def _nothing(self, exchange: Exchange, call: Call) -> None:
        path = exchange.path
        status = 405 if path in self._calls_of or path in self._plain else 404
        error = invalid(f"{exchange.method} {path} is not part of this API")
        reply_json(exchange, call, reply.error_body(error), status, reply.error_headers(error))

    def _healthz(self, exchange: Exchange) -> None:
        exchange.reply(200, b"ok\n", TEXT)

    def _readyz(self, exchange: Exchange) -> None:
        if self.ready:
            exchange.reply(200, b"ok\n", TEXT)
        else:
            exchange.reply(503, b"draining\n" if self._front.draining else b"no worker pair yet\n", TEXT)

    def _scrape(self, exchange: Exchange) -> None:
        exchange.reply(200, self._metrics.render(), "text/plain; version=0.0.4; charset=utf-8")


def _close_unwanted(waiting: asyncio.Task[Generation]) -> None:
    if not waiting.cancelled() and waiting.exception() is None:
        waiting.result().close()


def _raise_error(event: Event, call: Call) -> None:
    if isinstance(event, Ended):
        call.output_tokens += event.completion_tokens
        if event.error is not None:
            raise event.error


def _model_card(model: Model) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "lanewise",
        "max_model_len": model.max_context_tokens,
    }
