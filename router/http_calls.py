"""What happens around every HTTP call: errors become answers, and one line goes to the access log.

Owns: the mapping of LanewiseError to HTTP status, body and headers; the access log. Must not: know what a call does.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from lanewise.errors import ErrorCode, LanewiseError
from lanewise.router.http_exchange import Exchange
from lanewise.router.metrics import RouterMetrics
from lanewise.router.openai_reply import error_body, error_headers

MAX_CLIENT_ID = 256
ACCOUNT_DELAY_S = 0.002
CLIENT_GONE = 499

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Call:
    """What the access log tells of one call."""

    client_id: str
    request_id: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: ErrorCode | None = None


Serve = Callable[[Exchange, Call], Awaitable[None]]


class Calls:
    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    async def serve(self, serve: Serve, exchange: Exchange) -> None:
        """Let `serve` answer; what it raises becomes the answer."""
        started = time.monotonic()
        call = Call(client_id=(exchange.header(b"x-request-id") or "")[:MAX_CLIENT_ID])
        answered = False
        try:
            await _answered(serve, exchange, call)
            answered = True
        except ConnectionError:  # while it was written to
            call.error = ErrorCode.CANCELLED
            raise
        finally:
            took_s = time.monotonic() - started
            # The answer is on its way; nothing that only we read may keep this thread from the next one.
            account = partial(self._account, exchange, exchange.status if answered else CLIENT_GONE, took_s, call)
            asyncio.get_running_loop().call_later(ACCOUNT_DELAY_S, account)

    def _account(self, exchange: Exchange, status: int, took_s: float, call: Call) -> None:
        self._metrics.http.labels(str(status)).inc()
        log.info(
            "http",
            method=exchange.method,
            path=exchange.path,
            status=status,
            duration_ms=round(took_s * 1000, 2),
            request_id=call.request_id,
            client_request_id=call.client_id,
            stream=call.stream,
            prompt_tokens=call.prompt_tokens,
            output_tokens=call.output_tokens,
            error=call.error,
        )


async def _answered(serve: Serve, exchange: Exchange, call: Call) -> None:
    try:
        if exchange.fault is not None:
            raise exchange.fault
        await serve(exchange, call)
        return
    except LanewiseError as error:
        failure = error
    except ConnectionError:
        raise
    except Exception:
        log.exception("http_defect", path=exchange.path, request_id=call.request_id)
        failure = LanewiseError(ErrorCode.INTERNAL, "internal error; the router's log has the details")
    call.error = failure.code
    reply_json(exchange, call, error_body(failure), failure.transport.http, error_headers(failure))


def reply_json(
    exchange: Exchange, call: Call, body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    named = headers_of(call)
    exchange.reply(status, body, "application/json; charset=utf-8", named | headers if headers else named)


def headers_of(call: Call) -> dict[str, str]:
    """A client's own id is echoed; otherwise it learns ours."""
    return {"x-request-id": call.client_id or call.request_id or str(uuid.uuid4())}
