"""`lanewise chaos`: options, the order of a campaign, and where its results go.

Owns: the command line. Must not: inject (inject.py), ask (traffic.py) or judge (report.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lanewise.chaos.inject import Arms, Hit, Injector
from lanewise.chaos.plan import KINDS
from lanewise.chaos.report import passed, slowest, summarise, tables
from lanewise.chaos.service import running
from lanewise.chaos.traffic import Traffic, Trip, prompts, undisturbed
from lanewise.cli import CommandFailed, command_parser
from lanewise.client import AsyncClient
from lanewise.errors import ConfigError, LanewiseError

SLOWEST = 5
"""Requests whose way through the router is told in the report."""


def chaos(argv: Sequence[str]) -> int:
    """Exit 0: nothing wrong, hung, failed or leaked, and recovery within its bound; 1 otherwise."""
    options = _parser().parse_args(argv)
    kinds = tuple(options.kinds.split(",")) if options.kinds else KINDS
    if unknown := set(kinds) - set(KINDS):
        raise ConfigError(f"--kinds: no {', '.join(sorted(unknown))}; expected some of {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="lanewise-chaos-") as directory:
        try:
            report = asyncio.run(_campaign(options, kinds, Path(directory)))
        except* (CommandFailed, LanewiseError) as several:
            raise _first(several) from several
    if options.json != "-":
        _show(report)
    if options.json == "-":
        print(json.dumps(report))
    elif options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))
    return 0 if passed(report) else 1


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The parts of a campaign run as tasks; what failed first explains the others."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "chaos",
        "Break a local service of its own on purpose, and check every answer against an undisturbed one.\n"
        "The seed fixes prompts and the draw of faults; when each meets its state depends on the machine.",
        "lanewise chaos --seed 1 --requests 200 --faults 60 --json chaos.json",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--requests", type=_count, default=200, metavar="N", help="at least (default: %(default)s)")
    parser.add_argument("--faults", type=_count, default=60, metavar="N", help="that hit (default: %(default)s)")
    parser.add_argument("--kinds", default="", metavar="K,K", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--prompts", type=_count, metavar="N", help="different ones (default: a tenth of the requests)")
    parser.add_argument("--concurrency", type=_count, default=16, metavar="N", help="requests under way at a time")
    parser.add_argument("--prefill", type=_count, default=2, metavar="N", help="prefill workers (default: 2)")
    parser.add_argument("--decode", type=_count, default=2, metavar="N", help="decode workers (default: 2)")
    parser.add_argument(
        "--no-content-hash",
        action="store_true",
        help="decode workers believe that offered KV is of the right prompt: `misbind` must then be noticed here",
    )
    parser.add_argument(
        "--encryption", choices=("None", "Authenticated", "Full"), default="None", help="of the channel"
    )
    parser.add_argument("--json", metavar="F", help="write the report; - is standard output")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


async def _campaign(options: argparse.Namespace, kinds: tuple[str, ...], directory: Path) -> dict[str, Any]:
    dice = random.Random(options.seed)
    asked = prompts(options.prompts or max(20, options.requests // 10), dice)
    names = (*(f"prefill-{n}" for n in range(options.prefill)), *(f"decode-{n}" for n in range(options.decode)))
    arms = Arms(directory / "faults", names, "unbound" if options.no_content_hash else "")
    async with running(directory, options.prefill, options.decode, options.encryption) as service:
        client = AsyncClient(service.grpc)
        try:
            answers = await undisturbed(client, asked, options.concurrency)
            traffic = Traffic(client, asked, answers, random.Random(dice.getrandbits(32)))
            injector = Injector(service, arms, options.faults, kinds, random.Random(dice.getrandbits(32)))
            async with asyncio.TaskGroup() as group:
                group.create_task(injector.run())
                group.create_task(traffic.run(options.requests, options.concurrency, lambda: injector.done))
        finally:
            await client.close()
        leaked = await service.leaked_blocks()
    stories = [_story(*each) for each in slowest(injector.hits, traffic.trips, SLOWEST)]
    return summarise(traffic.trips, injector.hits, leaked, injector.unreachable, options.seed, stories)


def _story(hit: Hit, trip: Trip, seconds: float) -> dict[str, Any]:
    fault = hit.fault
    return {"fault": fault.spec, "process": fault.process, "recovery_s": round(seconds, 2), "steps": trip.story}


def _show(report: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables(report):
        console.print(table)
    for trip in report["problems"][:20]:
        console.print(f"request {trip['number']}: {trip['outcome']}: {trip['detail'][:300]}", markup=False)
    names = ("requests", "faults", "wrong", "hung", "failed", "cancelled", "leaked_blocks")
    console.print(", ".join(f"{report[name]} {name}" for name in names), markup=False)
    console.print(
        f"recovery p50 {report['recovery_p50_s']:.2f} s, p99 {report['recovery_p99_s']:.2f} s, "
        f"max {report['recovery_max_s']:.2f} s; {'passed' if passed(report) else 'FAILED'}",
        markup=False,
    )
