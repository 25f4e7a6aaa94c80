"""Worker pods get torch in the tests although their resource says nothing of it: manifests can be used as they are.

Owns: an admission policy for namespaces that carry LABEL; it adds what `worker_pod_template()` would. Must not: reach
any other namespace. (torch is too big for an image that is imported in every run.)
"""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.tools import wait_for

LABEL = "lanewise-test/torch"
NAME = "lanewise-test-torch"
API = "admissionregistration.k8s.io/v1"


def provide(cluster: Cluster, namespace: str) -> None:
    """From now on worker pods that are made in `namespace` have torch."""
    template: Any = cluster.worker_pod_template()
    policy = {
        "apiVersion": API,
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": NAME},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {
                "resourceRules": [
                    {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
                ],
            },
            "matchConditions": [
                {
                    "name": "a-worker",
                    "expression": "object.metadata.?labels['app.kubernetes.io/component'].orValue('')"
                    " in ['prefill', 'decode']",
                }
            ],
            "mutations": [
                {"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": _object(template["spec"])}}
            ],
        },
    }
    where = {"namespaceSelector": {"matchLabels": {LABEL: "true"}}}
    binding = {
        "apiVersion": API,
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": NAME},
        "spec": {"policyName": NAME, "matchResources": where},
    }
    cluster.apply(policy, binding)
    cluster.kubectl("label", "namespace", namespace, f"{LABEL}=true")
    wait_for(lambda: _works(cluster, namespace), "worker pods to be given torch", 30)


def _works(cluster: Cluster, namespace: str) -> bool:
    """Whether a dry run shows it: policies take effect a moment after they are stored."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "labels": {"app.kubernetes.io/component": "decode"}},
        "spec": {"containers": [{"name": "worker", "image": "none"}]},
    }
    made = cluster.kubectl(
        "create", "-n", namespace, "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(pod)
    )
    return any("hostPath" in volume for volume in json.loads(made)["spec"].get("volumes", ()))


def _object(spec: Any, kind: str = "Object.spec") -> str:
    """A pod's spec as CEL of an apply configuration."""
    fields = ", ".join(f"{key}: {_value(value, f'{kind}.{key}')}" for key, value in spec.items())
    body = f"{kind}{{{fields}}}"
    return f"Object{{spec: {body}}}" if kind == "Object.spec" else body


def _value(value: Any, kind: str) -> str:
    if isinstance(value, dict):
        return _object(value, kind)
    if isinstance(value, list):
        return f"[{', '.join(_value(item, kind) for item in value)}]"
    return json.dumps(value)
