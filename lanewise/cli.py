"""The `lanewise` command: a table of commands, each imported only when it is asked for.

Owns: the table, the exit status (0 done, 1 failed, 2 bad usage), how errors look, and the small commands `check` and
`version`. To add a command, add one line to COMMANDS: `module:function`, where the function takes the arguments after
the command's name and returns the exit status (None is 0).
Must not: import anything heavy at module level; `lanewise --help` has to answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from lanewise import __version__
from lanewise.errors import ConfigError, LanewiseError

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("lanewise.local.commands:up", "serve a model on this machine: router, prefill and decode workers"),
    "down": ("lanewise.local.commands:down", "stop what `up` started"),
    "status": ("lanewise.local.commands:status", "show the processes of a local service"),
    "generate": ("lanewise.local.ask:generate", "continue a text, streamed"),
    "explain": ("lanewise.local.ask:explain", "show how one request was routed and when"),
    "bench": ("lanewise.bench.command:bench", "measure an OpenAI or Lanewise endpoint"),
    "sim": ("lanewise.sim.cli:main", "replay a trace under one or several policies"),
    "plan": ("lanewise.sim.plan:main", "find the cheapest cluster that holds an SLO on a trace"),
    "keys": ("lanewise.local.keys:keys", "make and rotate the keys between the workers of a service"),
    "chaos": ("lanewise.chaos.command:chaos", "break a local service on purpose and check every answer"),
    "manifests": ("lanewise.operator.manifests:main", "print what the operator would apply for a file"),
    "profile": ("lanewise.bench.profile:main", "measure a model on this machine as a cost profile"),
    "check": ("lanewise.cli:check", "check an LLMService or ScalingPolicy file"),
    "crds": ("lanewise.operator.crd:crds", "print the custom resource definitions"),
    "version": ("lanewise.cli:version", "print the version"),
}
"""Command -> (module:function, one line of help). Only what exists is listed."""


class CommandFailed(Exception):
    """A command that could not do its work; ends with status 1 and this text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; every failure becomes one line on stderr and an exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        arguments[0] = "version"
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _fail(f"no command {name!r}; expected one of {', '.join(COMMANDS)}", 2)
    module, _, function = COMMANDS[name][0].partition(":")
    try:
        result = int(getattr(importlib.import_module(module), function)(rest) or 0)
        sys.stdout.flush()  # here, so that a reader that left is noticed here
        return result
    except ConfigError as error:
        return _fail(str(error), 2)
    except (CommandFailed, LanewiseError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `lanewise status | head`: the reader left, which is no failure; the flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def command_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of one command; every command shows an example in its help."""
    return argparse.ArgumentParser(
        prog=f"lanewise {name}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: lanewise COMMAND ...",
            "",
            "LLM serving with prefill and decode on separate workers.",
            "",
            *lines,
            "",
            "`lanewise COMMAND --help` shows its options and an example.",
        )
    )


def _fail(message: str, status: int) -> int:
    print(f"lanewise: {message}", file=sys.stderr)
    return status


def version(argv: Sequence[str]) -> int:
    """`lanewise version`."""
    parser = command_parser("version", "Print the version of Lanewise.", "lanewise version --json")
    parser.add_argument("--json", action="store_true", help="version, Python and platform as JSON")
    if parser.parse_args(argv).json:
        import platform

        facts = {"version": __version__, "python": platform.python_version(), "platform": platform.platform()}
        print(json.dumps(facts))
    else:
        print(f"lanewise {__version__}")
    return 0


def check(argv: Sequence[str]) -> int:
    """`lanewise check`: exit 0 sound, 1 not sound, 2 unreadable or bad usage."""
    parser = command_parser(
        "check",
        "Check the Lanewise resources in a YAML file. Lists every problem with its line.",
        "lanewise check deploy/samples/fable.yaml",
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="problems and digests as JSON")
    parser.add_argument("--full", action="store_true", help="also hash every byte of the model's weights")
    options = parser.parse_args(argv)
    from lanewise.spec import LLMService
    from lanewise.spec_yaml import SpecError, read_resources

    try:
        resources = read_resources(options.file)
    except SpecError as error:
        _report(options.json, {"ok": False, "problems": [_as_dict(problem) for problem in error.problems]}, str(error))
        return 1
    if not resources:
        text = f"{options.file}:1: no LLMService or ScalingPolicy in this file"
        _report(options.json, {"ok": False, "problems": [{"file": options.file, "line": 1, "message": text}]}, text)
        return 1
    found = []
    for resource in resources:
        item = {"kind": resource.kind, "name": resource.metadata.name}
        if options.full and isinstance(resource, LLMService):
            item["weights"] = _full_digest(resource.spec.model.uri, resource.spec.model.revision)
        found.append(item)
    lines = [" ".join((options.file + ":", *item.values(), "is sound")) for item in found]
    _report(options.json, {"ok": True, "resources": found}, "\n".join(lines))
    return 0


def _full_digest(uri: str, revision: str) -> str:
    """Digest of all weight bytes; loads the engine's reader only here, since it is heavy."""
    if uri.startswith("pvc://"):
        raise ConfigError(f"--full: {uri} is a Kubernetes claim; check the files where they are mounted")
    try:
        sources = importlib.import_module("lanewise.engine.sources")
        checkpoint = importlib.import_module("lanewise.engine.checkpoint")
    except ImportError as error:
        raise ConfigError(f"--full needs the worker packages (pip install 'lanewise[worker]'): {error}") from error
    return str(checkpoint.Checkpoint(sources.resolve(uri, revision)).full_digest())


def _as_dict(problem: object) -> dict[str, object]:
    return {name: getattr(problem, name) for name in ("file", "line", "field", "message")}


def _report(as_json: bool, data: dict[str, object], text: str) -> None:
    print(json.dumps(data) if as_json else text)
