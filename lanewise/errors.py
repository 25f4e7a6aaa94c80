"""The one error tree of Lanewise and its mapping to gRPC and HTTP.

Owns: the error codes a client can see, what each means on either transport, and whether a client may retry.
Must not: import anything of Lanewise, nor a transport library (codes are named by their standard words).
Foreign exceptions are turned into these at the edge that called the foreign library, nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ErrorCode(StrEnum):
    """Every error a request can end with."""

    INVALID_REQUEST = "INVALID_REQUEST"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    FORBIDDEN = "FORBIDDEN"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    CANCELLED = "CANCELLED"
    OVERLOADED = "OVERLOADED"
    NO_WORKERS = "NO_WORKERS"
    DRAINING = "DRAINING"
    DEADLINE = "DEADLINE"
    WORKER_LOST = "WORKER_LOST"
    INTERNAL = "INTERNAL"


class Retry(StrEnum):
    """What a client should do with the same request."""

    NO = "no"
    LATER = "later"  # after the hinted time
    YES = "yes"


@dataclass(frozen=True, slots=True)
class Transport:
    """One row of the table in docs/contracts.md: how a code looks on each transport."""

    grpc: str
    """Name of the `grpc.StatusCode` member."""
    http: int
    retry: Retry
    openai_type: str
    """`error.type` in the OpenAI error body."""


TRANSPORT: dict[ErrorCode, Transport] = {
    ErrorCode.INVALID_REQUEST: Transport("INVALID_ARGUMENT", 400, Retry.NO, "invalid_request_error"),
    ErrorCode.PROMPT_TOO_LONG: Transport("INVALID_ARGUMENT", 400, Retry.NO, "invalid_request_error"),
    ErrorCode.MODEL_NOT_FOUND: Transport("NOT_FOUND", 404, Retry.NO, "invalid_request_error"),
    ErrorCode.UNAUTHENTICATED: Transport("UNAUTHENTICATED", 401, Retry.NO, "authentication_error"),
    ErrorCode.FORBIDDEN: Transport("PERMISSION_DENIED", 403, Retry.NO, "permission_error"),
    ErrorCode.PAYLOAD_TOO_LARGE: Transport("RESOURCE_EXHAUSTED", 413, Retry.NO, "invalid_request_error"),
    ErrorCode.CANCELLED: Transport("CANCELLED", 499, Retry.NO, "cancelled"),
    ErrorCode.OVERLOADED: Transport("RESOURCE_EXHAUSTED", 429, Retry.LATER, "rate_limit_error"),
    ErrorCode.NO_WORKERS: Transport("UNAVAILABLE", 503, Retry.YES, "server_error"),
    ErrorCode.DRAINING: Transport("UNAVAILABLE", 503, Retry.YES, "server_error"),
    ErrorCode.DEADLINE: Transport("DEADLINE_EXCEEDED", 504, Retry.NO, "server_error"),
    ErrorCode.WORKER_LOST: Transport("INTERNAL", 500, Retry.NO, "server_error"),
    ErrorCode.INTERNAL: Transport("INTERNAL", 500, Retry.NO, "server_error"),
}


class LanewiseError(Exception):
    """An error with a code of the table above.

    `param` names the request field at fault; `retry_after_s` is the hint for codes whose retry is LATER or YES.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def transport(self) -> Transport:
        return TRANSPORT[self.code]

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class ConfigError(Exception):
    """A file, flag or model directory that cannot be used; ends the process with status 2 and this text."""


def invalid(message: str, param: str | None = None) -> LanewiseError:
    """The commonest error: a bad request field."""
    return LanewiseError(ErrorCode.INVALID_REQUEST, message, param=param)
