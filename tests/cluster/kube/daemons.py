"""Command lines and configuration files of the programs of a one-node Kubernetes.

Owns: every flag and its reason. Must not: start anything (see lifecycle.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.cluster.kube.slots import Slot

PAUSE_IMAGE = "registry.local/pause:1"
MAX_PODS = 200
AUDIT_MAX_MB = 4000
CLUSTER_DOMAIN = "cluster.local"


def write_files(slot: Slot, cni: Path) -> None:
    """The configuration files of all daemons, under the cluster's root. `cni`: folder of the CNI plugins."""
    root = slot.root
    for folder in ("log", "kubelet", "containerd", "cni/net.d", "podlogs", "opt"):
        (root / folder).mkdir(parents=True)
    (root / "audit.yaml").write_text(
        "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: Metadata, omitStages: [RequestReceived]}]\n"
    )
    (root / "resolv.conf").write_text(f"nameserver {slot.dns_ip}\n")
    for name, content in (("kubelet", kubelet(slot)), ("proxy", proxy(slot)), ("cni/net.d/bridge", bridge(slot))):
        suffix = ".conflist" if name.startswith("cni") else ".json"
        (root / f"{name}{suffix}").write_text(json.dumps(content, indent=1))
    (root / "containerd.toml").write_text(containerd(slot, cni))
    (root / "Corefile").write_text(corefile(slot))


def etcd(slot: Slot) -> list[str]:
    return [
        *("etcd", "--data-dir", f"{slot.root}/etcd", "--log-level", "warn", "--unsafe-no-fsync"),
        *("--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379"),
        *("--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380"),
        *("--initial-cluster", "default=http://127.0.0.1:2380"),
    ]


def apiserver(slot: Slot) -> list[str]:
    """The front-proxy flags let aggregated APIs (KEDA's metrics) work and keep the log quiet."""
    pki = f"{slot.root}/pki"
    return [
        *("kube-apiserver", "--etcd-servers=http://127.0.0.1:2379"),
        *("--bind-address=0.0.0.0", "--secure-port=443", f"--advertise-address={slot.node_ip}"),
        f"--service-cluster-ip-range={slot.service_cidr}",
        *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true"),
        *(f"--audit-log-path={slot.audit_log}", f"--audit-policy-file={slot.root}/audit.yaml"),
        f"--audit-log-maxsize={AUDIT_MAX_MB}",
        *(f"--client-ca-file={pki}/ca.crt", "--kubelet-preferred-address-types=InternalIP"),
        *(f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key"),
        f"--kubelet-certificate-authority={pki}/ca.crt",
        f"--kubelet-client-certificate={pki}/kubelet-client.crt",
        f"--kubelet-client-key={pki}/kubelet-client.key",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        *(f"--service-account-key-file={pki}/sa.pub", f"--service-account-signing-key-file={pki}/sa.key"),
        *(f"--proxy-client-cert-file={pki}/front-proxy.crt", f"--proxy-client-key-file={pki}/front-proxy.key"),
        *("--enable-aggregator-routing=true", f"--requestheader-client-ca-file={pki}/ca.crt"),
        "--requestheader-allowed-names=front-proxy-client",
        *("--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group"),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
    ]


def _controller(slot: Slot, user: str) -> list[str]:
    """With the default client limits the first ServiceAccount takes eight seconds to appear."""
    kubeconfig = f"{slot.root}/pki/{user}.kubeconfig"
    return [
        *(f"--kubeconfig={kubeconfig}", f"--authentication-kubeconfig={kubeconfig}"),
        *(f"--authorization-kubeconfig={kubeconfig}", "--bind-address=127.0.0.1"),
        *("--leader-elect=false", "--kube-api-qps=500", "--kube-api-burst=1000"),
    ]


def controller_manager(slot: Slot) -> list[str]:
    pki = f"{slot.root}/pki"
    return [
        *("kube-controller-manager", *_controller(slot, "controller-manager"), "--use-service-account-credentials"),
        *(f"--service-account-private-key-file={pki}/sa.key", f"--root-ca-file={pki}/ca.crt"),
        *(f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key"),
    ]


def scheduler(slot: Slot) -> list[str]:
    return ["kube-scheduler", *_controller(slot, "scheduler")]


def kubelet_command(slot: Slot) -> list[str]:
    return [
        *("kubelet", f"--config={slot.root}/kubelet.json", f"--kubeconfig={slot.root}/pki/node.kubeconfig"),
        *(f"--hostname-override={slot.node}", f"--node-ip={slot.node_ip}", f"--root-dir={slot.root}/kubelet"),
    ]


def proxy_command(slot: Slot) -> list[str]:
    return ["kube-proxy", f"--config={slot.root}/proxy.json", f"--hostname-override={slot.node}"]


def kubelet(slot: Slot) -> dict[str, object]:
    """One node that never evicts: the machine's disk and memory are not what the tests are about."""
    pki = f"{slot.root}/pki"
    never = dict.fromkeys(
        ("memory.available", "nodefs.available", "nodefs.inodesFree", "imagefs.available", "imagefs.inodesFree"), "0%"
    )
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": slot.cgroup,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "failSwapOn": False,
        "localStorageCapacityIsolation": False,
        "enforceNodeAllocatable": [],
        "evictionHard": never,
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "maxPods": MAX_PODS,
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [slot.dns_ip],
        "resolvConf": f"{slot.root}/resolv.conf",
        "podLogsDir": f"{slot.root}/podlogs",
        "tlsCertFile": f"{pki}/kubelet.crt",
        "tlsPrivateKeyFile": f"{pki}/kubelet.key",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "volumePluginDir": f"{slot.root}/kubelet/plugins-exec",
        "registryPullQPS": 0,
    }


def proxy(slot: Slot) -> dict[str, object]:
    """The connection tracking limits belong to the machine, so they are left alone."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": slot.pod_cidr,
        "clientConnection": {"kubeconfig": f"{slot.root}/pki/proxy.kubeconfig"},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpCloseWaitTimeout": "0s", "tcpEstablishedTimeout": "0s"},
        "nftables": {"minSyncPeriod": "100ms"},
    }


def bridge(slot: Slot) -> dict[str, object]:
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": slot.pod_cidr}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": f"{slot.root}/cni/data",
    }
    plugin = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipMasq": False, "ipam": ipam}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]}


def containerd(slot: Slot, cni: Path) -> str:
    return f"""version = 3
root = "{slot.root}/containerd"
state = "/run/containerd"
[plugins.'io.containerd.internal.v1.opt']
  path = "{slot.root}/opt"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "{PAUSE_IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["{cni}"]
    conf_dir = "{slot.root}/cni/net.d"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      SystemdCgroup = false
"""


def corefile(slot: Slot) -> str:
    """Answers live two seconds, so that a test sees a changed Service soon."""
    return f"""{CLUSTER_DOMAIN}:53 {{
  bind {slot.node_ip}
  errors
  kubernetes {CLUSTER_DOMAIN} {{
    kubeconfig {slot.root}/pki/admin.kubeconfig lanewise
    ttl 2
  }}
}}
"""


def dns_service(slot: Slot) -> list[dict[str, object]]:
    """CoreDNS runs beside the pods, not as one; this gives it the usual Service address."""
    ports = [("dns", "UDP"), ("dns-tcp", "TCP")]
    meta = {"name": "kube-dns", "namespace": "kube-system"}
    service: dict[str, object] = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {
            "clusterIP": slot.dns_ip,
            "ports": [{"name": name, "port": 53, "protocol": protocol} for name, protocol in ports],
        },
    }
    endpoints: dict[str, object] = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**meta, "labels": {"kubernetes.io/service-name": "kube-dns"}},
        "addressType": "IPv4",
        "ports": [{"name": name, "port": 53, "protocol": protocol} for name, protocol in ports],
        "endpoints": [{"addresses": [slot.node_ip], "conditions": {"ready": True}}],
    }
    return [service, endpoints]
