"""What the operator reads off a download: the commit, the failure in its own words, the progress."""

from typing import Any

from aiohttp import web

from lanewise.operator import model_state
from lanewise.operator.model_state import download_state, resolved
from lanewise.operator.observed import Known
from lanewise.operator.plan_model import job_name
from lanewise.spec import LLMService, builtin_service
from lanewise.spec_status import ModelStatus

DATA = builtin_service().model_dump(by_alias=True, exclude_none=True, exclude={"status"})
DATA["spec"]["model"] = {"uri": "hf://a/b", "revision": "main", "cache": {"claim": "c"}}
HUB = LLMService.model_validate(DATA)
PINNED = ModelStatus(uri="hf://a/b", revision="main", commit="abc")


def known(*pods: dict[str, Any], finished: str = "") -> Known:
    conditions = [{"type": finished, "status": "True", "message": "too many failures"}] if finished else []
    job = {"kind": "Job", "metadata": {"name": job_name(HUB)}, "status": {"conditions": conditions}}
    found = Known()
    found.children[("Job", job_name(HUB))] = job
    for index, pod in enumerate(pods):
        pod["metadata"] = {"name": f"p{index}", "labels": {"job-name": job_name(HUB)}, "creationTimestamp": str(index)}
        found.children[("Pod", f"p{index}")] = pod
    return found


def ended(message: str) -> dict[str, Any]:
    state = {"name": "worker", "state": {"terminated": {"message": message}}}
    return {"status": {"phase": "Succeeded", "containerStatuses": [state]}}


def test_the_commit_is_what_the_job_says_and_stays_what_it_was() -> None:
    assert resolved(HUB, known(), None) is None
    assert resolved(HUB, known(ended('{"commit": "abc", "bytes": 5}')), None) == PINNED
    assert resolved(HUB, known(), PINNED) == PINNED
    assert resolved(HUB, known(), PINNED.model_copy(update={"revision": "v0"})) is None
    assert resolved(HUB, known(ended("Error: killed"), ended('{"error": "x"}')), None) is None
    assert resolved(builtin_service(), known(), None) is None


async def test_a_failure_is_told_in_its_own_words() -> None:
    failed = await download_state(HUB, known(ended('{"error": "a/b is gated"}'), finished="Failed"), None)
    assert failed is not None
    assert (failed.state, failed.message) == ("Failed", "a/b is gated")
    silent = await download_state(HUB, known(finished="Failed"), None)
    assert silent is not None
    assert silent.message.endswith("too many failures")
    done = await download_state(HUB, known(), PINNED)
    assert done is not None
    assert done.state == "Complete"
    assert await download_state(builtin_service(), known(), None) is None


async def test_progress_is_asked_from_the_pod(unused_tcp_port: int, monkeypatch: Any) -> None:
    async def progress(_: web.Request) -> web.Response:
        return web.json_response({"state": "downloading", "bytes_done": 1_234_000_000, "bytes_total": 9_876_000_000})

    app = web.Application()
    app.add_routes([web.get("/progress", progress)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    monkeypatch.setattr(model_state.names, "PROGRESS_PORT", unused_tcp_port)
    pod = {"status": {"phase": "Running", "podIP": "127.0.0.1"}}
    try:
        found = await download_state(HUB, known(pod), None)
    finally:
        await runner.cleanup()
    assert found is not None
    assert (found.state, found.message) == ("Downloading", "1.23 of 9.88 GB")
    gone = await download_state(HUB, known(pod), None)
    assert gone is not None
    assert (gone.state, gone.message) == ("Downloading", "downloading")
