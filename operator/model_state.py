"""What is known of a model's download: the commit once it is there, progress while it runs.

Owns: reading the download Job and its pods. Must not: start or delete a Job.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from lanewise.operator import names
from lanewise.operator.observed import Known
from lanewise.operator.plan_model import job_name, needs_download
from lanewise.operator.status import Download
from lanewise.spec import LLMService
from lanewise.spec_status import ModelStatus

PROGRESS_TIMEOUT_S = 1.0


def resolved(service: LLMService, known: Known, previous: ModelStatus | None) -> ModelStatus | None:
    """The commit of this uri and revision: as pinned before, or as the finished Job says. None: not yet."""
    model = service.spec.model
    if not needs_download(service):
        return None
    if previous is not None and (previous.uri, previous.revision) == (model.uri, model.revision):
        return previous
    for pod in _pods(service, known):
        commit = _termination(pod).get("commit")
        if isinstance(commit, str) and commit:
            return ModelStatus(uri=model.uri, revision=model.revision, commit=commit)
    return None


def job_finished(job: Mapping[str, Any]) -> str | None:
    """`Complete`, `Failed`, or None while it runs."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return None


async def download_state(service: LLMService, known: Known, model: ModelStatus | None) -> Download | None:
    """For the status; None where nothing is downloaded."""
    if not needs_download(service):
        return None
    if model is not None:
        return Download("Complete")
    job = known.child("Job", job_name(service))
    if job is None:
        return Download("Pending", "the download has not started")
    pods = _pods(service, known)
    if job_finished(job) == "Failed":
        said = [str(error) for pod in pods if (error := _termination(pod).get("error"))]
        condition = next(item for item in job["status"]["conditions"] if item["type"] == "Failed")
        return Download("Failed", said[-1] if said else f"Job {job_name(service)}: {condition.get('message', '')}")
    for pod in pods:
        address = pod.get("status", {}).get("podIP")
        if pod.get("status", {}).get("phase") == "Running" and address:
            return Download("Downloading", await _progress(address))
    return Download("Pending", "the download's pod is not running yet")


def _pods(service: LLMService, known: Known) -> list[dict[str, Any]]:
    """Pods of the current Job, oldest first."""
    found = [pod for pod in known.of("Pod") if pod["metadata"].get("labels", {}).get("job-name") == job_name(service)]
    return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))


def _termination(pod: Mapping[str, Any]) -> dict[str, Any]:
    for container in pod.get("status", {}).get("containerStatuses", []):
        if container["name"] == "worker":
            try:
                found = json.loads(container.get("state", {}).get("terminated", {}).get("message") or "{}")
            except ValueError:
                return {}  # the kernel's or the kubelet's words, not ours
            return found if isinstance(found, dict) else {}
    return {}


async def _progress(address: str) -> str:
    """`1.2 of 15.2 GB`, or why that is not known."""
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{names.PROGRESS_PORT}/progress"
    try:
        async with asyncio.timeout(PROGRESS_TIMEOUT_S), aiohttp.ClientSession() as session, session.get(url) as answer:
            found = await answer.json()
        total, done = float(found.get("bytes_total") or 0), float(found.get("bytes_done") or 0)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, TypeError):
        return "downloading"
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB" if total else str(found.get("state") or "downloading")
