"""`lanewise generate` and `lanewise explain`: the client on the command line.

Owns: their options and what they print. Must not: speak gRPC itself (client.py does).
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lanewise.cli import command_parser
from lanewise.errors import LanewiseError, Retry
from lanewise.local import state
from lanewise.local.machine import reachable

if TYPE_CHECKING:
    from lanewise.client import Options


def generate(argv: Sequence[str]) -> int:
    parser = command_parser(
        "generate", "Continue a text, streamed as it comes.", 'lanewise generate "Once upon a time" --max-tokens 64'
    )
    parser.add_argument("text", metavar="TEXT", help="the prompt; - reads it from standard input")
    _add_server(parser)
    parser.add_argument("--model", metavar="NAME", help="where the server has several")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--seed", type=int, metavar="S", help="equal seeds give equal texts")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--chat", action="store_true", help="send TEXT as a user's chat message")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of text")
    options = parser.parse_args(argv)
    text = sys.stdin.read() if options.text == "-" else options.text
    from lanewise.client import Accepted, Client, Delta, Finished

    asked: Options = {}
    for name in ("model", "max_tokens", "temperature", "seed", "stop"):
        if getattr(options, name) is not None:
            asked[name] = getattr(options, name)
    prompt = [{"role": "user", "content": text}] if options.chat else text
    request_id, pieces, finished, failure = "", list[str](), None, None
    with Client(options.server or default_server(), api_key=_api_key(options.api_key)) as client:
        try:
            for event in client.generate(prompt, **asked):
                if isinstance(event, Accepted):
                    request_id = event.request_id
                elif isinstance(event, Finished):
                    finished = event
                elif isinstance(event, Delta):
                    pieces.append(event.text)
                    if not options.json:
                        print(event.text, end="", flush=True)
        except LanewiseError as error:
            failure = error
    if options.json:
        print(json.dumps(_as_json(request_id, "".join(pieces), finished, failure), ensure_ascii=False))
        return 1 if failure else 0
    if pieces:
        print()
    if failure:
        raise failure
    return 0


def _as_json(request_id: str, text: str, finished: object, failure: LanewiseError | None) -> dict[str, object]:
    body: dict[str, object] = {"request_id": request_id, "text": text}
    if finished is not None:
        body["finish_reason"] = getattr(finished, "reason", "")
        body["usage"] = asdict(finished.usage)  # type: ignore[attr-defined]
    if failure is not None:
        retry = failure.transport.retry is not Retry.NO
        body["error"] = {"code": failure.code, "message": failure.message, "param": failure.param, "retry": retry}
    return body


def explain(argv: Sequence[str]) -> int:
    parser = command_parser(
        "explain",
        "Show how one recent request was routed, tried and served, with times.",
        "lanewise explain 0b6f3a52-8a3e-4a0e-9d6e-0d1b2c3d4e5f",
    )
    parser.add_argument("request_id", metavar="REQUEST_ID", help="the router's id, as `generate --json` prints it")
    _add_server(parser)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    from lanewise.client import Client

    with Client(options.server or default_server(), api_key=_api_key(options.api_key)) as client:
        steps = client.explain(options.request_id)
    if options.json:
        print(json.dumps({"request_id": options.request_id, "steps": [asdict(step) for step in steps]}, indent=1))
    else:
        for step in steps:
            print(f"{step.at_ms:10.1f} ms  attempt {step.epoch}  {step.what}  {step.detail}".rstrip())
    return 0


def _add_server(parser: ArgumentParser) -> None:
    parser.add_argument("--server", metavar="ADDR", help="the router's gRPC address (default: the local service)")
    parser.add_argument("--api-key", metavar="KEY", help="default: $LANEWISE_API_KEY")


def _api_key(given: str | None) -> str | None:
    return given or os.environ.get("LANEWISE_API_KEY") or None


def default_server() -> str:
    """gRPC address of the local service, where exactly one runs; else the one `up` uses by default."""
    running = state.live_services()
    if len(running) == 1:
        return reachable(running[0].grpc)
    return "127.0.0.1:50051"
