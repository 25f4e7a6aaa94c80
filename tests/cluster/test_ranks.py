"""A prefill worker of two ranks in one real pod hands its KV to a decode worker of one."""

from __future__ import annotations

import pytest

from tests.cluster.fleet import HTTP_PORT, TRANSFERS, scrape
from tests.cluster.idle import idle_service
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for
from tests.cluster.load import undisturbed

pytestmark = pytest.mark.usefixtures("chart")
NAME = "ranked"
READY_S = 120


def test_ranks_share_a_pod(cluster: Cluster, namespace: str) -> None:
    worker = {"podTemplate": cluster.worker_pod_template(), "resources": {"requests": {"cpu": "50m"}}}
    roles = {"prefill": worker | {"tensorParallel": 2}, "decode": worker, "router": {"podTemplate": {}}}
    cluster.apply(idle_service(NAME, namespace, disaggregation="Always", **roles))
    wait_for(lambda: condition(cluster.get("llmservice", NAME, namespace), "Ready") == "True", "Ready", READY_S)
    address = f"{cluster.resolve(f'{NAME}-router.{namespace}.svc')}:{HTTP_PORT}"
    assert all(undisturbed(lambda: address, 8).values())
    selector = f"lanewise.io/service={NAME},app.kubernetes.io/component=router"
    (router,) = cluster.pods(namespace, selector, ready=True)
    figures = scrape(f"{router['status']['podIP']}:{HTTP_PORT}")
    assert figures is not None
    assert figures[TRANSFERS] > 0, "no KV went from the ranks to the decode worker"
