"""A real one-node Kubernetes for tests.

Fixtures:
- `cluster` (session): a `Cluster` (kube/cluster.py): kubectl(), helm(), apply(), get(), items(), pods(), audit, images,
  node_ip, resolve("chat-router.ns.svc") through the cluster's DNS, restart_apiserver(), signal_pod(),
  worker_pod_template(), kubeconfig. Addresses of pods and Services are reached directly from the test process.
- `own_cluster`: the same, and the test is skipped where --kubeconfig put its machine out of reach.
- `namespace`: a fresh namespace per test, deleted afterwards.
- `chart` (session): release `lanewise` in namespace `lanewise`, from deploy/helm/lanewise with the tests' images.

Every test here carries the marker `cluster`. `--kubeconfig FILE` uses a cluster that is there already: one of `make
cluster`, or any other (with `--control-image` and `--worker-image`). Without Linux and root all is skipped; where
LANEWISE_CLUSTER=required is set (.ci/run does so on Linux as root) a skip is a failure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster.kube import contents, debian, gobuild, lifecycle
from tests.cluster.kube.chart import Chart, install
from tests.cluster.kube.cluster import Cluster, Images, NotOurs
from tests.cluster.kube.requirements import why_not
from tests.cluster.kube.tools import wait_for

HERE = Path(__file__).parent
TIMEOUT_S = 300
REQUIRED = os.environ.get("LANEWISE_CLUSTER") == "required"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TIMEOUT_S))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.is_relative_to(HERE) and why_not() and not item.config.getoption("--kubeconfig"):
        pytest.skip(why_not())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail") and item.path.is_relative_to(HERE):
        report.outcome = "failed"
        report.longrepr = f"skipped, but a skipped cluster test is a failure here: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def programs() -> None:
    """Programs and image layers of a cluster, made if they are missing (`make test-cluster` has done so before)."""
    debian.install()
    gobuild.build()
    contents.prepare()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    given = request.config.getoption("--kubeconfig")
    if given:
        named = {"control": "--control-image", "worker": "--worker-image"}
        images = {key: value for key, flag in named.items() if (value := request.config.getoption(flag))}
        kubeconfig = Path(given).resolve()
        ours = next((slot for slot in lifecycle.left_running() if slot.kubeconfig == kubeconfig), None)
        yield Cluster(kubeconfig, lifecycle.attach(ours) if ours else None, Images(**images))
        return
    request.getfixturevalue("programs")
    running = lifecycle.start()
    try:
        yield Cluster(running.slot.kubeconfig, running)
    finally:
        lifecycle.stop(running)


@pytest.fixture
def own_cluster(cluster: Cluster) -> Cluster:
    """The cluster, where its machine is within reach."""
    try:
        assert cluster.slot
    except NotOurs as error:
        pytest.skip(str(error))
    return cluster


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    base = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40].strip("-")
    name = f"{base}-{os.urandom(3).hex()}"
    cluster.kubectl("create", "namespace", name)
    wait_for(lambda: cluster.find("serviceaccount", "default", name), f"the default ServiceAccount of {name}", 30)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def chart(cluster: Cluster) -> Chart:
    return install(cluster)
