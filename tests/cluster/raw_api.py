"""Requests to the API server over one kept connection, as a program makes them: hundreds of them in a second or two.

Owns: the connection and the answer's parts. Must not: hide a refusal; a test wants to read it.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

DEADLINE_S = 30
PLURALS = {"LLMService": "llmservices", "ScalingPolicy": "scalingpolicies"}
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@dataclass(frozen=True)
class Answer:
    code: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))

    @property
    def causes(self) -> list[tuple[str, str]]:
        """(field, message) of each thing that is wrong; the note that not all rules were looked at is left out."""
        found = self.body.get("details", {}).get("causes", [])
        return [(item.get("field", ""), item["message"]) for item in found if item.get("field") != "<nil>"]


class RawApi:
    """Use as a context manager. `kubeconfig` holds client certificates, as paths or as data."""

    def __init__(self, kubeconfig: Path, scratch: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        context = ssl.create_default_context(cafile=_file(cluster, "certificate-authority", scratch))
        context.load_cert_chain(_file(user, "client-certificate", scratch), _file(user, "client-key", scratch))
        address = urlsplit(cluster["server"])
        self._connection = http.client.HTTPSConnection(
            address.hostname or "", address.port or 443, timeout=DEADLINE_S, context=context
        )
        weakref.finalize(self, self._connection.close)  # of a thread that has ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def call(self, method: str, path: str, body: object = None, content: str = "application/json") -> Answer:
        """`body` is an object, or JSON text where what is sent could not be an object."""
        text = body if isinstance(body, str) else None if body is None else json.dumps(body)
        self._connection.request(method, path, text, {"Content-Type": content, "Accept": "application/json"})
        answer = self._connection.getresponse()
        return Answer(answer.status, json.loads(answer.read() or b"{}"))

    def apply_definition(self, definition: dict[str, Any]) -> Answer:
        path = f"{DEFINITIONS}/{definition['metadata']['name']}?fieldManager=test&force=true&fieldValidation=Strict"
        return self.call("PATCH", path, definition, "application/apply-patch+yaml")


def place(kind: str, namespace: str, name: str = "") -> str:
    """The path of our resources; writes want `?fieldValidation=Strict` after it."""
    path = f"/apis/lanewise.io/v1alpha1/namespaces/{namespace}/{PLURALS[kind]}"
    return f"{path}/{name}" if name else path


def _file(part: dict[str, str], key: str, scratch: Path) -> str:
    if key in part:
        return part[key]
    path = scratch / key
    path.write_bytes(base64.b64decode(part[f"{key}-data"]))
    return str(path)
