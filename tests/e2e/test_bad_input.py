"""Bad input over real sockets: a clear error or a clean cancel, the service unharmed, no other request touched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.e2e.service import Service, generate_all, request, running, until

pytestmark = pytest.mark.e2e
BYSTANDER = request("Once upon a time", max_tokens=300, temperature=0.8, seed=3, ignore_eos=True)


@pytest.fixture
def bystander(audited: Service) -> Iterator[None]:
    """Another request runs during the test and must come out as if nothing had happened."""
    expected = asyncio.run(generate_all(audited.grpc, [BYSTANDER]))[0].text

    outcome: list[str] = []

    def run() -> None:
        outcome.append(asyncio.run(generate_all(audited.grpc, [BYSTANDER]))[0].text)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(60)
    assert outcome == [expected]


def post(service: Service, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, object]]:
    call = urllib.request.Request(
        service.http + path, data=body, headers={"Content-Type": "application/json", **headers}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(call, timeout=30)
    with raised.value as error:
        assert error.headers["x-should-retry"] == "false"
        return error.code, json.loads(error.read())["error"]


def complete(service: Service, **fields: object) -> tuple[int, dict[str, object]]:
    return post(service, "/v1/completions", json.dumps({"model": "fable", "prompt": "x", **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "status", "code", "words"),
    [
        ({"prompt": [7] * 3000}, 400, "PROMPT_TOO_LONG", "3000"),
        ({"prompt": "word " * 4000}, 400, "PROMPT_TOO_LONG", "2048"),
        ({"model": "nobody"}, 404, "MODEL_NOT_FOUND", "nobody"),
        ({"temperature": -0.1}, 400, "INVALID_REQUEST", "temperature"),
        ({"max_tokens": 0}, 400, "INVALID_REQUEST", "max_tokens"),
        ({"top_p": 2}, 400, "INVALID_REQUEST", "top_p"),
        ({"prompt": [99_999_999]}, 400, "INVALID_REQUEST", "99999999"),
        ({"prompt": ""}, 400, "INVALID_REQUEST", "prompt"),
        ({"stop": ["a"] * 9}, 400, "INVALID_REQUEST", "stop"),
        ({"surprise": 1}, 400, "INVALID_REQUEST", "surprise"),
        ({"response_format": {"type": "json_object"}}, 400, "INVALID_REQUEST", "response_format"),
        ({"n": 1000}, 400, "INVALID_REQUEST", "n"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_bad_field_is_named(
    audited: Service, bystander: None, fields: dict[str, object], status: int, code: str, words: str
) -> None:
    got, error = complete(audited, **fields)
    assert (got, error["code"]) == (status, code), error
    assert words in str(error["message"])


@pytest.mark.parametrize(
    ("body", "words"),
    [(b'{"model": "fable", "prompt": "\xff\xfe"}', "UTF-8"), (b"{not json", "JSON"), (b"[1]", "object"), (b"", "JSON")],
)
def test_malformed_bodies(audited: Service, bystander: None, body: bytes, words: str) -> None:
    status, error = post(audited, "/v1/completions", body)
    assert (status, error["code"]) == (400, "INVALID_REQUEST")
    assert words in str(error["message"])


def test_a_body_of_20_mb_is_refused(audited: Service, bystander: None) -> None:
    body = json.dumps({"model": "fable", "prompt": "x" * 20_000_000}).encode()
    with socket.create_connection(address(audited), timeout=30) as raw:
        raw.sendall(head(body))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            raw.sendall(body)  # it may be refused while it is still being sent
        reply = raw.recv(4096)
    assert b"413" in reply.split(b"\r\n")[0]
    assert b"PAYLOAD_TOO_LARGE" in reply


def test_malformed_protobuf(audited: Service, bystander: None) -> None:
    with grpc.insecure_channel(audited.grpc) as channel:
        call = channel.unary_stream("/lanewise.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError) as raised:
            list(call(b"\xff\xff\xff\xff not protobuf", timeout=10))
    assert raised.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)


def test_grpc_errors_carry_their_code(audited: Service) -> None:
    with grpc.insecure_channel(audited.grpc) as channel, pytest.raises(grpc.RpcError) as raised:
        list(pb_grpc.InferenceStub(channel).Generate(request("x", max_tokens=4, temperature=-1.0), timeout=10))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailers = dict(raised.value.trailing_metadata())
    assert trailers["lanewise-code"] == "INVALID_REQUEST"
    assert trailers["x-should-retry"] == "false"


def test_a_client_that_disconnects_is_cancelled_on_both_sides(audited: Service, bystander: None) -> None:
    before = cancelled(audited)
    body = json.dumps(
        {"model": "fable", "prompt": "A long tale", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    ).encode()
    with socket.create_connection(address(audited), timeout=30) as raw:
        raw.sendall(head(body) + body)
        assert b"200" in raw.recv(4096)
        until(lambda: running_requests(audited) >= 1, 10, lambda: "never ran")

    # Long before 1500 tokens could be done.
    until(lambda: cancelled(audited) > before, 3, lambda: "not cancelled")


def test_a_grpc_client_that_cancels(audited: Service, bystander: None) -> None:
    before = cancelled(audited)
    with grpc.insecure_channel(audited.grpc) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(
            request("A long tale", max_tokens=1500, temperature=0.9, ignore_eos=True)
        )
        for _ in range(5):
            next(call)
        call.cancel()
    until(lambda: cancelled(audited) > before, 5, lambda: "not cancelled")


def test_a_deadline_ends_a_request_with_deadline(audited: Service) -> None:
    with grpc.insecure_channel(audited.grpc) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(
            request("A long tale", max_tokens=1500, temperature=0.9, ignore_eos=True), timeout=0.5
        )
        try:  # the router and the client's own library race to say it
            code = [event.finished.error.code for event in call if event.HasField("finished")]
        except grpc.RpcError as error:
            code = [{grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE"}.get(error.code(), str(error))]
    assert code == ["DEADLINE"]


def test_a_client_that_stops_reading_is_cancelled_alone(tmp_path: Path) -> None:
    """Its own tokens wait in a bounded buffer; after the stall limit it is cancelled. Others stream on."""
    with running(tmp_path, env={"LANEWISE_CLIENT_STALL_S": "2"}) as service:
        body = json.dumps(
            {"model": "fable", "prompt": "A", "max_tokens": 1900, "stream": True, "ignore_eos": True, "logprobs": 5}
        ).encode()
        raws = []
        for _ in range(4):
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(address(service))
            raw.sendall(head(body) + body)
            raws.append(raw)
        results = asyncio.run(generate_all(service.grpc, [BYSTANDER] * 4))
        assert [result.reason for result in results] == ["length"] * 4
        until(lambda: cancelled(service) == 4, 60, lambda: f"{cancelled(service)} of 4 cancelled")
        for raw in raws:
            raw.close()
        service.audit()


def address(service: Service) -> tuple[str, int]:
    host, _, port = service.http.removeprefix("http://").partition(":")
    return host, int(port)


def head(body: bytes) -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()


def running_requests(service: Service) -> int:
    return sum(worker.stats.running_requests + worker.stats.queued_requests for worker in service.snapshot().workers)


def cancelled(service: Service) -> float:
    return service.metric("lanewise_requests_total", outcome="CANCELLED")
