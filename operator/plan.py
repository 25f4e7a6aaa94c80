"""From one LLMService to everything that should exist for it. Pure: same resource and context, same bytes.

Owns: which objects there are and in what order they are applied. Must not: talk to a cluster, read a clock, or decide
when a role rolls (rollout.py does).
"""

from __future__ import annotations

from lanewise.errors import ConfigError
from lanewise.operator import names
from lanewise.operator.plan_config import render_config
from lanewise.operator.plan_model import cache_claim, download_job, needs_download
from lanewise.operator.plan_network import accounts, disruption_budgets, monitors, network_policies, services
from lanewise.operator.plan_pods import deployment
from lanewise.operator.plan_types import Manifest, Plan, PlanContext, child
from lanewise.spec import LLMService

RENDERING = 1
"""Version of these rules. A change that would alter the pods of a running service needs a new number beside this one,
with the old rules kept: golden manifests of every released version stand in tests/operator/golden."""


def plan(service: LLMService, context: PlanContext) -> Plan:
    """Objects in the order of application: what pods refer to comes before the pods.

    ConfigError where podTemplate cannot be merged, naming the path, or where these rules are not known any more.
    """
    if context.runtime.rendering != RENDERING:
        raise ConfigError(f"status.runtime.rendering: expected {RENDERING}, got {context.runtime.rendering}")
    config = {role: render_config(service, context, role) for role in names.ROLES}
    download = needs_download(service)
    before: list[Manifest] = [*accounts(service, context), config_map(service, context, config)]
    claim = cache_claim(service, context)
    if claim is not None:
        before.append(claim)
    before += [*services(service, context), *network_policies(service, context, download)]
    before += [*disruption_budgets(service, context), *monitors(service, context)]
    if download:
        before.append(download_job(service, context))
    roles = names.ROLES if not download or context.commit else ("router",)
    deployments = {role: deployment(service, context, role, config[role]) for role in roles}
    return Plan((*before, *deployments.values()), deployments, config)


def config_map(service: LLMService, context: PlanContext, config: dict[str, str]) -> Manifest:
    """The files of all roles, one key each."""
    data = {f"{role}.yaml": text for role, text in sorted(config.items())}
    return child(service, context, "v1", "ConfigMap", f"{service.metadata.name}-config", None, data=data)


def unsupported(service: LLMService) -> str | None:
    """What this version would have to ignore, named: better no pods than pods that silently do something else."""
    spec = service.spec
    if spec.transfer.encryption != "None" and spec.transfer.secret_ref is None:
        return (
            f"spec.transfer.secretRef: encryption {spec.transfer.encryption} expects the Secret with the keys, which "
            "the operator may neither read nor write: make it with `lanewise keys make DIR` and `kubectl create secret "
            "generic NAME --from-file DIR`"
        )
    if spec.transfer.channel in ("NCCL", "IPC"):
        return f"spec.transfer.channel: expected Auto or ZeroMQ with this version, got {spec.transfer.channel}"
    if spec.router.tls is not None:
        return "spec.router.tls: this version serves plain HTTP and gRPC; terminate TLS in front of the router"
    return None
