"""How a service is reached and by whom: Services, NetworkPolicies, disruption budgets, monitors, accounts.

Owns: everything beside pods and configuration. NetworkPolicies restrict ingress only; egress is the cluster's to rule.
Must not: build pods.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lanewise.operator import names
from lanewise.operator.names import selector
from lanewise.operator.plan_config import has_data_port
from lanewise.operator.plan_types import Manifest, PlanContext, child
from lanewise.spec import LLMService

PROMETHEUS = {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}
MONITORING_API = "monitoring.coreos.com/v1"
HEADLESS = f"{names.PREFIX}/headless"


def services(service: LLMService, context: PlanContext) -> Iterator[Manifest]:
    """One for clients; headless ones for discovery. None publishes addresses that are not ready."""
    name, wanted = service.metadata.name, service.spec.router.service
    ports = [_service_port("http", names.HTTP_PORT), _service_port("grpc", names.GRPC_PORT)]
    spec: dict[str, Any] = {"type": wanted.type, "selector": selector(name, "router"), "ports": ports}
    front = child(service, context, "v1", "Service", f"{name}-router", "router", spec=spec)
    if wanted.annotations:
        front["metadata"]["annotations"] = dict(wanted.annotations)
    yield front
    yield _headless(service, context, f"{name}-routers", "router", ports)
    for role in names.WORKERS:
        yield _headless(service, context, f"{name}-{role}", role, [_service_port("grpc", names.WORKER_PORT)])


def _headless(service: LLMService, context: PlanContext, name: str, role: str, ports: list[Manifest]) -> Manifest:
    spec = {"type": "ClusterIP", "clusterIP": "None", "selector": selector(service.metadata.name, role), "ports": ports}
    made = child(service, context, "v1", "Service", name, role, spec=spec)
    made["metadata"]["labels"][HEADLESS] = "true"
    return made


def _service_port(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "port": number, "targetPort": name, "protocol": "TCP"}


def network_policies(service: LLMService, context: PlanContext, download: bool) -> Iterator[Manifest]:
    """Who may open a connection to whom, and nothing else:

    clients, operator and KEDA -> router; router -> workers' gRPC; prefill -> decode's KV; Prometheus -> metrics
    (a router's are on its HTTP port); operator -> progress of a download.
    """
    name = service.metadata.name
    routers = [{"podSelector": {"matchLabels": selector(name, "router")}}]
    prefills = [{"podSelector": {"matchLabels": selector(name, "prefill")}}]
    scrapers = [{"namespaceSelector": {}, "podSelector": PROMETHEUS}]
    work = {"from": routers, "ports": [_tcp(names.WORKER_PORT)]}
    scrape = {"from": scrapers, "ports": [_tcp(names.METRICS_PORT)]}
    kv = [_tcp(names.KV_PORT)]
    if has_data_port(service):
        kv.append(_tcp(names.KV_DATA_PORT))
    rules: dict[str, list[dict[str, Any]]] = {
        "router": [{"ports": [_tcp(names.HTTP_PORT), _tcp(names.GRPC_PORT)]}],
        "prefill": [work, scrape],
        "decode": [work, {"from": prefills, "ports": kv}, scrape],
    }
    if download:
        operators = [{"namespaceSelector": {}, "podSelector": OPERATOR}]
        rules["download"] = [{"from": operators, "ports": [_tcp(names.PROGRESS_PORT)]}]
    for role, ingress in rules.items():
        pods = {"matchLabels": selector(name, role)}
        spec = {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": ingress}
        yield child(service, context, "networking.k8s.io/v1", "NetworkPolicy", f"{name}-{role}", role, spec=spec)


OPERATOR = {"matchLabels": {"app.kubernetes.io/name": "lanewise", names.COMPONENT_LABEL: "operator"}}
"""How the chart labels the operator's pods."""


def _tcp(port: int) -> dict[str, Any]:
    return {"port": port, "protocol": "TCP"}


def disruption_budgets(service: LLMService, context: PlanContext) -> Iterator[Manifest]:
    """One pod of a role at a time; a pod that is not healthy may always go, or a broken one would block its node."""
    name = service.metadata.name
    for role in names.ROLES:
        spec = {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": selector(name, role)},
        }
        yield child(service, context, "policy/v1", "PodDisruptionBudget", f"{name}-{role}", role, spec=spec)


def accounts(service: LLMService, context: PlanContext) -> Iterator[Manifest]:
    """Routers read EndpointSlices of their namespace; workers may nothing and get no token."""
    name = service.metadata.name
    for role, mounted in (("router", True), ("worker", False)):
        component = role if role == "router" else None
        yield child(
            service,
            context,
            "v1",
            "ServiceAccount",
            f"{name}-{role}",
            component,
            automountServiceAccountToken=mounted,
        )
    api = "rbac.authorization.k8s.io"
    yield child(
        service,
        context,
        f"{api}/v1",
        "RoleBinding",
        f"{name}-router",
        "router",
        roleRef={"apiGroup": api, "kind": "ClusterRole", "name": context.router_cluster_role},
        subjects=[{"kind": "ServiceAccount", "name": f"{name}-router", "namespace": context.namespace}],
    )


def monitors(service: LLMService, context: PlanContext) -> Iterator[Manifest]:
    """For the Prometheus operator, where its API exists."""
    name = service.metadata.name
    if "ServiceMonitor" in context.monitors:
        once = {"key": HEADLESS, "operator": "DoesNotExist"}  # two Services select the routers
        chosen = {"matchLabels": names.labels(name, "router"), "matchExpressions": [once]}
        spec = {"selector": chosen, "endpoints": [{"port": "http", "path": "/metrics"}]}
        yield child(service, context, MONITORING_API, "ServiceMonitor", f"{name}-router", "router", spec=spec)
    if "PodMonitor" in context.monitors:
        workers = {"key": names.COMPONENT_LABEL, "operator": "In", "values": list(names.WORKERS)}
        chosen = {"matchLabels": {names.SERVICE_LABEL: name}, "matchExpressions": [workers]}
        spec = {"selector": chosen, "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics"}]}
        yield child(service, context, MONITORING_API, "PodMonitor", f"{name}-workers", None, spec=spec)
