"""KEDA itself beside a cluster's daemons: its operator and its metrics adapter, as programs of the node.

Owns: their certificate, the APIs they bring (CRDs, the aggregated external.metrics.k8s.io), how they start and go.
Must not: know what is scaled.
They find names as their pods would: through the cluster's DNS with a pod's search path.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.kube import gobuild, pki
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.components import SOAK
from tests.cluster.kube.daemons import CLUSTER_DOMAIN
from tests.cluster.kube.slots import Slot
from tests.cluster.kube.tools import wait_for

NAMESPACE = "keda"
ADAPTER = "keda-metrics-apiserver"
API = "v1beta1.external.metrics.k8s.io"
READER = "keda-external-metrics-reader"
PARTS = [part for part in SOAK if part.name == "keda"]
OPERATOR_PORT, ADAPTER_PORT, ADAPTER_METRICS_PORT = 9666, 6443, 8082
READY_S = 120.0
IN_PLACE = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
"""For `sh -c` in a mount namespace of its own: another resolv.conf than the machine's, then the program."""


def build() -> None:
    """Ten minutes of two cores the first time, nothing later. Raises BuildError."""
    gobuild.build(PARTS)


@contextmanager
def running(cluster: Cluster) -> Iterator[None]:
    """KEDA serves its metrics; afterwards every trace of it is gone. Its API above all: namespaces could not end."""
    slot = cluster.slot
    certificates = _certificates(slot)
    crds = gobuild.data_dir("keda") / "config" / "crd" / "bases"
    with ExitStack() as undo:  # from the last line to the first
        undo.callback(cluster.kubectl, "delete", "namespace", NAMESPACE, "--wait=false")
        undo.callback(cluster.kubectl, "delete", "clusterrole,clusterrolebinding", READER)
        undo.callback(cluster.kubectl, "delete", "-f", str(crds), "--wait=false")
        cluster.apply(*(path.read_text() for path in sorted(crds.glob("*.yaml"))))
        cluster.apply(*_objects(slot))
        for name, flags in (("keda-operator", _operator(certificates)), ("keda-adapter", _adapter(slot, certificates))):
            cluster.start(_command(slot, name, flags), name)
            undo.callback(cluster.stop, name)
        undo.callback(cluster.kubectl, "delete", "apiservice", API)
        undo.callback(cluster.kubectl, "delete", "scaledobjects", "--all", "--all-namespaces", "--timeout=60s")
        ready = f"{API} to be served"
        wait_for(lambda: condition(cluster.get("apiservice", API), "Available") == "True", ready, READY_S)
        yield


def _certificates(slot: Slot) -> Path:
    """One certificate for both: each is a server, and the adapter is the operator's client."""
    authority = slot.root / "pki"
    usage, names, addresses = "serverAuth,clientAuth", [f"{ADAPTER}.{NAMESPACE}.svc"], [slot.node_ip, "127.0.0.1"]
    pki.certificate(authority, "keda", "/CN=keda", usage, names, addresses)
    folder = slot.root / "keda"
    folder.mkdir(exist_ok=True)
    for source, name in (("ca.crt", "ca.crt"), ("keda.crt", "tls.crt"), ("keda.key", "tls.key")):
        shutil.copyfile(authority / source, folder / name)
    search = " ".join(f"{part}{CLUSTER_DOMAIN}" for part in (f"{NAMESPACE}.svc.", "svc.", ""))
    (folder / "resolv.conf").write_text(f"nameserver {slot.dns_ip}\nsearch {search}\noptions ndots:5\n")
    return folder


def _command(slot: Slot, name: str, flags: list[str]) -> list[str]:
    """`unshare` becomes the program itself, so that the supervisor signals and reaps the right process."""
    program = next(folder / name for folder in gobuild.bin_dirs(PARTS) if (folder / name).exists())
    environment = {
        "KUBECONFIG": str(slot.kubeconfig),
        "POD_NAMESPACE": NAMESPACE,
        "KEDA_CLUSTER_OBJECT_NAMESPACE": NAMESPACE,
        "WATCH_NAMESPACE": "",
    }
    settings = [f"{key}={value}" for key, value in environment.items()]
    inside = ["sh", "-c", IN_PLACE, "sh", f"{slot.root}/keda/resolv.conf", "env", *settings, str(program), *flags]
    return ["unshare", "--mount", *inside]


def _operator(certificates: Path) -> list[str]:
    return [f"--cert-dir={certificates}", f"--metrics-service-bind-address=:{OPERATOR_PORT}", "--zap-log-level=info"]


def _adapter(slot: Slot, certificates: Path) -> list[str]:
    """`--port` is that of its own figures: 8080 is the operator's, which shares the node's network with it here."""
    kubeconfigs = ("lister-kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    return [
        *(f"--{name}={slot.kubeconfig}" for name in kubeconfigs),
        *(f"--secure-port={ADAPTER_PORT}", f"--port={ADAPTER_METRICS_PORT}", f"--cert-dir={certificates}"),
        *(f"--tls-cert-file={certificates}/tls.crt", f"--tls-private-key-file={certificates}/tls.key"),
        *(f"--client-ca-file={certificates}/ca.crt", f"--metrics-service-address=127.0.0.1:{OPERATOR_PORT}"),
    ]


def _objects(slot: Slot) -> list[dict[str, Any]]:
    """What KEDA's own manifests hold beside its pods: the API, who serves it, and that the HPA controller may ask."""
    group = "rbac.authorization.k8s.io"
    controller = {"kind": "ServiceAccount", "name": "horizontal-pod-autoscaler", "namespace": "kube-system"}
    meta = {"name": ADAPTER, "namespace": NAMESPACE}
    port = {"name": "https", "port": ADAPTER_PORT, "protocol": "TCP"}
    authority = base64.b64encode((slot.root / "pki" / "ca.crt").read_bytes()).decode()
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": READER},
            "rules": [{"apiGroups": ["external.metrics.k8s.io"], "resources": ["*"], "verbs": ["*"]}],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": READER},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": READER},
            "subjects": [controller],
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {"ports": [{"name": "https", "port": 443, "targetPort": ADAPTER_PORT, "protocol": "TCP"}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**meta, "labels": {"kubernetes.io/service-name": ADAPTER}},
            "addressType": "IPv4",
            "ports": [port],
            "endpoints": [{"addresses": [slot.node_ip], "conditions": {"ready": True}}],
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": API},
            "spec": {
                "group": "external.metrics.k8s.io",
                "version": "v1beta1",
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "service": {"name": ADAPTER, "namespace": NAMESPACE, "port": 443},
                "caBundle": authority,
            },
        },
    ]
