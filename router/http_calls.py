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
from aiohttp import web

from lanewise.errors import ErrorCode, LanewiseError
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


Serve = Callable[[web.Request, Call], Awaitable[web.StreamResponse]]


class Calls:
    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def serve(self, serve: Serve) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            started = time.monotonic()
            call = Call(client_id=request.headers.get("x-request-id", "")[:MAX_CLIENT_ID])
            status = CLIENT_GONE
            try:
                response = await _answered(serve, request, call)
                status = response.status
                return response
            except ConnectionError:  # while it was written to
                call.error = ErrorCode.CANCELLED
                raise
            finally:
                took_s = time.monotonic() - started
                # aiohttp writes the answer after this returns: nothing that only we read may stand before it.
                account = partial(self._account, request.method, request.path, status, took_s, call)
                asyncio.get_running_loop().call_later(ACCOUNT_DELAY_S, account)

        return handle

    def _account(self, method: str, path: str, status: int, took_s: float, call: Call) -> None:
        self._metrics.http.labels(str(status)).inc()
        log.info(
            "http",
            method=method,
            path=path,
            status=status,
            duration_ms=round(took_s * 1000, 2),
            request_id=call.request_id,
            client_request_id=call.client_id,
            stream=call.stream,
            prompt_tokens=call.prompt_tokens,
            output_tokens=call.output_tokens,
            error=call.error,
        )


async def _answered(serve: Serve, request: web.Request, call: Call) -> web.StreamResponse:
    try:
        return await serve(request, call)
    except LanewiseError as error:
        failure = error
    except (web.HTTPException, ConnectionError):
        raise
    except Exception:
        log.exception("http_defect", path=request.path, request_id=call.request_id)
        failure = LanewiseError(ErrorCode.INTERNAL, "internal error; the router's log has the details")
    call.error = failure.code
    return json_response(error_body(failure), call, failure.transport.http, error_headers(failure))


def json_response(
    body: bytes, call: Call, status: int = 200, headers: dict[str, str] | None = None
) -> web.StreamResponse:
    headers = {**headers_of(call), **(headers or {})}
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def headers_of(call: Call) -> dict[str, str]:
    """A client's own id is echoed; otherwise it learns ours."""
    return {"x-request-id": call.client_id or call.request_id or str(uuid.uuid4())}
