"""`lanewise bench`: options, warm-up, progress, and where the results go.

Owns: the command line and the order of a run. Must not: measure (targets.py, drive.py) or define numbers (report.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lanewise.bench import plot
from lanewise.bench.drive import Sample, closed_loop, open_loop, warm_up
from lanewise.bench.report import Slo, rows, summarise, table
from lanewise.bench.targets import Answer, Settings, Target, connect
from lanewise.bench.workload import Ask, Lengths, Prompts, from_trace, read_words, synthetic
from lanewise.cli import CommandFailed, command_parser
from lanewise.errors import ConfigError
from lanewise.spec_types import Duration

WARM_UP_SEED = 1_000_000_000  # prompts of the warm-up are never asked again
DEFAULT_REQUESTS = 100


def bench(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    slo = Slo(_duration(options.slo_ttft, "--slo-ttft"), _duration(options.slo_tpot, "--slo-tpot"))
    asks = _workload(options)
    words = None if options.prompt_text is None else read_words(options.prompt_text)
    prompts = Prompts(options.seed, _token_range(options.token_ids), words)
    if options.plot:
        plot.require()
    samples, settings = _run(_measure(options, asks, prompts))
    report = {
        "url": options.url,
        "model": settings.model,
        "mode": _mode(options),
        "seed": options.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **summarise(samples, slo),
    }
    if options.json != "-":
        print(f"{options.url}  model {settings.model}  {report['mode']}\n\n{table(report)}")
    if options.json:
        _write_json(options.json, {**report, "per_request": rows(samples)})
    if options.plot:
        plot.draw(samples, slo, f"{settings.model}, {report['mode']}", options.plot)
    return 0 if report["succeeded"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "bench",
        "Measure an endpoint: http://HOST:PORT/v1 (any OpenAI server) or grpc://HOST:PORT (Lanewise).\n"
        "Prompts are random token ids that share no prefix. docs/bench.md defines every number.",
        "lanewise bench http://127.0.0.1:8000/v1 --rate 4 --requests 200 "
        "--prompt-tokens 80%:64,20%:1536 --slo-ttft 400ms --slo-tpot 50ms",
    )
    parser.add_argument("url", metavar="URL")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--concurrency", type=_positive_int, metavar="N", help="always N requests under way")
    load.add_argument("--rate", type=_positive, metavar="R", help="Poisson arrivals, R requests per second")
    load.add_argument("--trace", metavar="FILE", help="CSV with arrival_s,prompt_tokens,output_tokens")
    parser.add_argument("--requests", type=_positive_int, metavar="N", help="how many (default: 100, or the trace)")
    parser.add_argument(
        "--rate-scale", type=_positive, default=1.0, metavar="X", help="replay the trace X times as fast"
    )
    parser.add_argument(
        "--prompt-tokens", default="128", metavar="L", help="N, A-B or 80%%:64,20%%:1536 (default: 128)"
    )
    parser.add_argument("--output-tokens", default="32", metavar="L", help="the same forms (default: 32)")
    parser.add_argument("--prompt-text", nargs="?", const="", metavar="FILE", help="send words, not token ids")
    parser.add_argument("--token-ids", default="100-2000", metavar="A-B", help="range of ids (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="default: the first the endpoint lists")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--no-ignore-eos", action="store_true", help="let answers end by themselves")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="unmeasured requests first (default: 2)")
    parser.add_argument("--timeout", default="600s", metavar="D", help="of one request (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of arrivals, lengths and prompts")
    parser.add_argument("--api-key", metavar="KEY", help="default: $LANEWISE_API_KEY")
    parser.add_argument("--slo-ttft", metavar="D", help="target such as 400ms, for goodput")
    parser.add_argument("--slo-tpot", metavar="D", help="target such as 50ms, for goodput")
    parser.add_argument("--json", metavar="F", help="write the report and every request; - is standard output")
    parser.add_argument("--plot", metavar="F", help="write a figure (png, svg, pdf)")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _duration(text: str | None, flag: str) -> float | None:
    if text is None:
        return None
    try:
        return Duration.parse(text).seconds
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _token_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise ConfigError(f"--token-ids: expected a range such as 100-2000, got {text!r}")
    return int(low), int(high)


def _workload(options: argparse.Namespace) -> list[Ask]:
    if options.trace:
        return from_trace(options.trace, options.requests, options.rate_scale)
    prompts, outputs = Lengths.parse(options.prompt_tokens), Lengths.parse(options.output_tokens)
    return synthetic(options.requests or DEFAULT_REQUESTS, options.rate, prompts, outputs, options.seed)


def _mode(options: argparse.Namespace) -> str:
    if options.trace:
        return f"trace {Path(options.trace).name} x{options.rate_scale:g}"
    return f"rate {options.rate:g}/s" if options.rate else f"concurrency {options.concurrency}"


def _run(main: Coroutine[Any, Any, tuple[list[Sample], Settings]]) -> tuple[list[Sample], Settings]:
    """On uvloop where it is there: the client must cost less than what it measures."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


async def _measure(options: argparse.Namespace, asks: list[Ask], prompts: Prompts) -> tuple[list[Sample], Settings]:
    import os

    api_key = options.api_key or os.environ.get("LANEWISE_API_KEY")
    timeout_s = _duration(options.timeout, "--timeout") or 600.0
    settings = Settings(options.model, options.temperature, not options.no_ignore_eos, timeout_s, api_key)
    target = connect(options.url, settings)
    try:
        if settings.model is None:
            models = await target.models()
            if not models:
                raise CommandFailed(f"{options.url} lists no model; name one with --model")
            settings = replace(settings, model=models[0])
        settings = await _prepare(target, asks, prompts, settings, max(0, options.warmup))
        samples: list[Sample] = []
        with _progress(len(asks)) as advance:

            def on_sample(sample: Sample) -> None:
                samples.append(sample)
                advance(sample)

            if options.concurrency:
                await closed_loop(target, asks, prompts, settings, options.concurrency, on_sample)
            else:
                await open_loop(target, asks, prompts, settings, on_sample)
        return samples, settings
    finally:
        await target.close()


async def _prepare(target: Target, asks: list[Ask], prompts: Prompts, settings: Settings, num: int) -> Settings:
    """Warm-up; finds out whether the endpoint knows ignore_eos, and stops early where nothing works at all."""
    fresh = [replace(ask, index=WARM_UP_SEED + i) for i, ask in enumerate(asks[:num])]
    answers = await warm_up(target, fresh, prompts, settings)
    if settings.ignore_eos and any(_refuses_ignore_eos(answer) for answer in answers):
        print("lanewise: the endpoint does not know ignore_eos; answers may end early", file=sys.stderr)
        settings = replace(settings, ignore_eos=False)
        answers = await warm_up(target, fresh, prompts, settings)
    if answers and all(answer.error for answer in answers):
        raise CommandFailed(f"the warm-up failed: {answers[0].error}: {answers[0].detail}")
    return settings


def _refuses_ignore_eos(answer: Answer) -> bool:
    return answer.error is not None and "ignore_eos" in answer.detail


def _progress(total: int) -> AbstractContextManager[Callable[[Sample], None]]:
    """A live line on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return nullcontext(lambda sample: None)
    from lanewise.bench.progress import live

    return live(total)


def _write_json(path: str, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise CommandFailed(f"cannot write {path}: {error.strerror}") from error
