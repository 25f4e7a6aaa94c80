"""`lanewise manifests FILE`: what the operator would apply, for review and GitOps.

Owns: the command. Must not: talk to a cluster; what depends on one (the commit of a model, optional APIs) is a flag.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import yaml

from lanewise.errors import ConfigError
from lanewise.operator.plan import plan, unsupported
from lanewise.operator.plan_model import needs_download
from lanewise.operator.plan_types import Manifest, PlanContext
from lanewise.operator.runtime import default_images, own_runtime
from lanewise.spec import LLMService
from lanewise.spec_yaml import read_resources

MONITORS = ("PodMonitor", "ServiceMonitor")


def main(argv: Sequence[str]) -> int:
    """Prints YAML documents, or one Kubernetes List with --json."""
    control, worker = default_images()
    parser = argparse.ArgumentParser(
        prog="lanewise manifests",
        description="Print the objects that the operator would apply for the LLMServices of a file.",
        epilog="example:\n  lanewise manifests deploy/samples/fable.yaml --namespace chat",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--namespace", help="default: the one in the file, else default")
    parser.add_argument("--control-image", default=control, help="image of routers (default: %(default)s)")
    parser.add_argument("--worker-image", default=worker, help="image of workers (default: %(default)s)")
    parser.add_argument("--router-cluster-role", default="lanewise-router", help="as in the chart")
    parser.add_argument("--commit", help="commit of an hf:// model with a cache; without it: what exists before it")
    parser.add_argument("--monitors", action="store_true", help="as where the Prometheus operator's API exists")
    parser.add_argument("--json", action="store_true", help="one List as JSON")
    options = parser.parse_args(argv)
    found = [item for item in read_resources(options.file) if isinstance(item, LLMService)]
    if not found:
        raise ConfigError(f"{options.file}: no LLMService in this file")
    objects: list[Manifest] = []
    for service in found:
        context = PlanContext(
            namespace=options.namespace or service.metadata.namespace or "default",
            uid="",
            runtime=own_runtime(options.control_image, options.worker_image),
            router_cluster_role=options.router_cluster_role,
            commit=options.commit,
            monitors=frozenset(MONITORS if options.monitors else ()),
        )
        objects += plan(service, context).objects
        _notes(service, options.commit)
    if options.json:
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=1))
    else:
        print(yaml.dump_all(objects, Dumper=PlainDumper, sort_keys=False, explicit_start=True), end="")
    return 0


class PlainDumper(yaml.SafeDumper):
    """Without anchors: parts that occur twice are written twice. Multi-line strings are blocks."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


PlainDumper.add_representer(str, _text)


def _notes(service: LLMService, commit: str | None) -> None:
    name = service.metadata.name
    refused = unsupported(service)
    if refused is not None:
        print(f"note: {name}: the operator applies none of this (Degraded/Unsupported): {refused}", file=sys.stderr)
    if needs_download(service) and commit is None:
        print(f"note: {name}: workers follow once the model is downloaded; see --commit", file=sys.stderr)
