"""A service whose workers talk encrypted, in real pods: keys from a Secret, probes without one, a port for data."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from lanewise.cli import main
from lanewise.rpc import lanewise_pb2 as pb
from lanewise.rpc import lanewise_pb2_grpc as pb_grpc
from tests.cluster.fleet import HTTP_PORT, TRANSFERS, scrape
from tests.cluster.idle import idle_service
from tests.cluster.kube.cluster import Cluster, condition
from tests.cluster.kube.tools import wait_for
from tests.cluster.load import undisturbed

pytestmark = pytest.mark.usefixtures("chart")
NAME, SECRET = "sealed", "sealed-keys"
WORKER_PORT = 50061
READY_S = 120


def pod_ip(cluster: Cluster, namespace: str, role: str) -> str:
    selector = f"lanewise.io/service={NAME},app.kubernetes.io/component={role}"
    (pod,) = cluster.pods(namespace, selector, ready=True)
    return str(pod["status"]["podIP"])


def test_keys_from_a_secret_serve_and_strangers_are_refused(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    worker = {"podTemplate": cluster.worker_pod_template(), "resources": {"requests": {"cpu": "50m"}}}
    transfer = {"encryption": "Authenticated", "secretRef": {"name": SECRET}}
    roles = {"prefill": worker, "decode": worker, "router": {"podTemplate": {}}}
    assert main(["keys", "make", str(tmp_path / "keys")]) == 0
    cluster.kubectl("create", "secret", "generic", SECRET, "-n", namespace, f"--from-file={tmp_path / 'keys'}")
    cluster.apply(idle_service(NAME, namespace, disaggregation="Always", transfer=transfer, **roles))
    wait_for(lambda: condition(cluster.get("llmservice", NAME, namespace), "Ready") == "True", "Ready", READY_S)
    address = f"{cluster.resolve(f'{NAME}-router.{namespace}.svc')}:{HTTP_PORT}"
    texts = undisturbed(lambda: address, 16)
    assert all(texts.values())
    figures = scrape(f"{pod_ip(cluster, namespace, 'router')}:{HTTP_PORT}")
    assert figures is not None
    assert figures[TRANSFERS] > 0, "no KV went from prefill to decode"
    stranger = f"{pod_ip(cluster, namespace, 'decode')}:{WORKER_PORT}"
    with grpc.insecure_channel(stranger) as channel, pytest.raises(grpc.RpcError) as refused:
        pb_grpc.WorkerStub(channel).Describe(pb.DescribeRequest(), timeout=3)  # type: ignore[no-untyped-call]
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
