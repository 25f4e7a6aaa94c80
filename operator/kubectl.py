"""`kubectl lanewise`: the plugin that kubectl finds by the name of its executable, `kubectl-lanewise`.

Owns: `status [NAME]`, what a person wants to know of a service in one screen, and `scaling [NAME]`, why it has as many
workers as it has. Must not: change anything. It runs on a user's machine with the user's credentials and reads
LLMServices and ScalingPolicies only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lanewise.errors import ConfigError
from lanewise.operator.scaling_explain import show

COLOURS = {"True": "green", "False": "red", "Unknown": "yellow"}
BAD_WHEN_TRUE = frozenset({"Degraded"})
NEUTRAL = frozenset({"Progressing", "DisaggregationBeneficial"})


def main(argv: Sequence[str] | None = None) -> None:
    """Exit status: 0 all are Ready (policies: Active), 1 one is not or the cluster cannot be read, 2 bad usage."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        status = asyncio.run(_status(options))
    except (ConfigError, OSError, TimeoutError) as error:
        print(f"kubectl lanewise: {error or type(error).__name__}", file=sys.stderr)
        status = 1
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kubectl lanewise",
        description="Look at LLMServices.",
        epilog="example:\n  kubectl lanewise status chat -n production",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="conditions, pods and lanes of services")
    scaling = commands.add_parser("scaling", help="inputs, requirement and decision of ScalingPolicies")
    for command in (status, scaling):
        command.add_argument("name", nargs="?", help="one of them; default: all of the namespace")
        command.add_argument("-n", "--namespace", help="default: the one of the kubeconfig's context")
        command.add_argument("-A", "--all-namespaces", action="store_true")
        command.add_argument(
            "--kubeconfig", default=os.environ.get("KUBECONFIG"), help="default: $KUBECONFIG, ~/.kube/config"
        )
        command.add_argument("--context", help="default: the kubeconfig's current one")
        command.add_argument("--json", action="store_true", help="name, namespace and status of each, as JSON")
    return parser


async def _status(options: argparse.Namespace) -> int:
    scaling = options.command == "scaling"
    kind = "ScalingPolicy" if scaling else "LLMService"
    found = await _fetch(options, "scalingpolicies" if scaling else "llmservices")
    if options.name:
        found = [item for item in found if item["metadata"]["name"] == options.name]
        if not found:
            raise ConfigError(f"no {kind} {options.name}")
    if options.json:
        fields = [
            {"namespace": item["metadata"]["namespace"], "name": item["metadata"]["name"], "status": item.get("status")}
            for item in found
        ]
        print(json.dumps(fields, indent=1))
    elif not found:
        print(f"no {kind} here")
    else:
        console = Console()
        for item in found:
            show(console, item) if scaling else _show(console, item)
    return 0 if all(_condition(item, "Active" if scaling else "Ready") == "True" for item in found) else 1


async def _fetch(options: argparse.Namespace, plural: str) -> list[dict[str, Any]]:
    from kubernetes.aio import config as kubeconfig
    from kubernetes.aio.client import ApiClient, ApiException, Configuration, CustomObjectsApi

    loaded = Configuration()
    try:
        await kubeconfig.load_kube_config(  # type: ignore[no-untyped-call]
            options.kubeconfig, context=options.context, client_configuration=loaded
        )
        _, active = kubeconfig.list_kube_config_contexts(options.kubeconfig)  # type: ignore[no-untyped-call]
    except kubeconfig.ConfigException as error:
        raise ConfigError(str(error)) from error
    namespace = options.namespace or active.get("context", {}).get("namespace") or "default"
    answer: Any
    async with ApiClient(loaded) as client, asyncio.timeout(30):
        api = CustomObjectsApi(client)
        try:
            if options.all_namespaces:
                answer = await api.list_cluster_custom_object("lanewise.io", "v1alpha1", plural)
            else:
                answer = await api.list_namespaced_custom_object("lanewise.io", "v1alpha1", namespace, plural)
        except ApiException as error:
            raise ConfigError(f"{error.status} {error.reason}") from error
    return list(answer["items"])


def _condition(item: dict[str, Any], kind: str) -> str:
    conditions = item.get("status", {}).get("conditions", [])
    return next((str(found["status"]) for found in conditions if found["type"] == kind), "Unknown")


def _show(console: Console, item: dict[str, Any]) -> None:
    metadata, status, spec = item["metadata"], item.get("status", {}), item.get("spec", {})
    console.print(
        f"[bold]{metadata['namespace']}/{metadata['name']}[/]  {spec['model']['uri']}  {status.get('url', '')}"
    )
    runtime = status.get("runtime")
    if runtime:
        console.print(f"  version {runtime['version']}, worker image {runtime['workerImage']}")
    roles = Table("role", "ready", "desired", "draining", box=None, padding=(0, 2))
    for role in ("router", "prefill", "decode"):
        counts = status.get(role, {})
        roles.add_row(role, *(str(counts.get(name, 0)) for name in ("ready", "desired", "draining")))
    console.print(roles)
    if status.get("lanes"):
        lanes = Table("lane", "up to tokens", "workers", "TTFT p99", box=None, padding=(0, 2))
        for lane in status["lanes"]:
            lanes.add_row(lane["name"], str(lane.get("maxTokens", "-")), str(lane["workers"]), lane.get("ttftP99", "-"))
        console.print(lanes)
    conditions = Table("condition", "status", "reason", "message", box=None, padding=(0, 2))
    for found in status.get("conditions", []):
        conditions.add_row(found["type"], _coloured(found), found["reason"], found.get("message", ""))
    console.print(conditions)


def _coloured(condition: dict[str, Any]) -> str:
    status = condition["status"]
    if condition["type"] in NEUTRAL:
        return str(status)
    good = {"True": "False", "False": "True"}.get(status, status) if condition["type"] in BAD_WHEN_TRUE else status
    return f"[{COLOURS[good]}]{status}[/]"
