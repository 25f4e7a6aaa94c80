"""Installs Lanewise's own chart into a test cluster, as a user would.

Owns: the values that the tests' images need. Must not: work around the chart.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.contents import ROOT

CHART = ROOT / "deploy" / "helm" / "lanewise"
INSTALL_DEADLINE = "120s"


@dataclass(frozen=True)
class Chart:
    """An installed release."""

    cluster: Cluster
    release: str
    namespace: str

    @property
    def name(self) -> str:
        """What the chart names its objects after the release."""
        return self.release if "lanewise" in self.release else f"{self.release}-lanewise"

    @property
    def selector(self) -> str:
        return f"app.kubernetes.io/instance={self.release},app.kubernetes.io/component=operator"

    def leader(self) -> str:
        """Name of the pod that holds the Lease, or empty."""
        lease = self.cluster.find("lease", self.name, self.namespace)
        holder = str(lease["spec"].get("holderIdentity") or "") if lease else ""
        names = [pod["metadata"]["name"] for pod in self.cluster.items("pods", self.namespace, self.selector)]
        return next((name for name in names if holder.startswith(name)), "")

    def upgrade(self, *values: str) -> None:
        """`helm upgrade` with `--set` values on top of those of the tests; waits until the operator is available."""
        install(self.cluster, self.release, self.namespace, *values)

    def uninstall(self) -> None:
        self.cluster.helm("uninstall", self.release, "-n", self.namespace, "--wait", "--timeout", INSTALL_DEADLINE)


def install(cluster: Cluster, release: str = "lanewise", namespace: str = "lanewise", *values: str) -> Chart:
    """Installs or upgrades a release and returns when its pods are ready."""
    settings = [*image_values(cluster), *values]
    # Values of environment variables are texts, whatever they look like.
    flags = [part for value in settings for part in ("--set-string" if "].value=" in value else "--set", value)]
    cluster.helm(
        *("upgrade", "--install", release, str(CHART), "-n", namespace, "--create-namespace"),
        *("--wait", "--timeout", INSTALL_DEADLINE, *flags),
    )
    chart = Chart(cluster, release, namespace)
    pods = cluster.pods(namespace, chart.selector)
    assert pods, f"the chart made no pod {chart.selector}"
    assert all(condition(pod, "Ready") == "True" for pod in pods)
    return chart


def image_values(cluster: Cluster) -> list[str]:
    """The chart's `--set` values that name the tests' images."""
    found = []
    for role, image in (("control", cluster.images.control), ("worker", cluster.images.worker)):
        repository, _, tag = image.rpartition(":")
        found += [f"images.{role}.repository={repository}", f"images.{role}.tag={tag}"]
    return found
