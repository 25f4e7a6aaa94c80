"""From `helm install` to streams, and what happens to 16 of them when everything around them changes.

Every step of `test_streams_survive_what_happens_around_them` hits pods that carry streams past their first token, as
the routers say of each pod. None may fail, none may say anything else than the undisturbed service says, and KV has to
go from prefill to decode in every step and again after it; the printed table is the record.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.fleet import HELD, HTTP_PORT, RESUMED, TRANSFERS, Counters, scrape
from tests.cluster.kube.chart import Chart
from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.tools import wait_for
from tests.cluster.life import MODELS_MOUNT, SERVICE, STEP_DEADLINE_S, Life, other_weights, say, spec
from tests.cluster.load import Load, Stream, undisturbed

pytestmark = pytest.mark.timeout(600)
TOKENS = 600
YOUNG = TOKENS // 2  # a stream with no more than this is still there when the pod is hit
COLUMNS = {"KV transfers": TRANSFERS, "resumed": RESUMED, "held": HELD}


@pytest.fixture(scope="module")
def life(cluster: Cluster, chart: Chart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    assert chart
    namespace = f"life-{os.urandom(2).hex()}"
    cluster.kubectl("create", "namespace", namespace)
    weights = other_weights(tmp_path_factory.mktemp("weights") / "other")
    body = {
        "apiVersion": "lanewise.io/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": SERVICE, "namespace": namespace},
        "spec": spec(cluster, weights),
    }
    cluster.apply(body)
    life = Life(cluster, namespace)
    life.wait_ready()
    yield life
    cluster.kubectl("delete", "llmservice", SERVICE, "-n", namespace, "--wait=true", "--timeout=60s")
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def test_a_completion_streams_through_the_service(life: Life) -> None:
    started = time.monotonic()
    life.expected = [undisturbed(life.address, TOKENS)]
    assert len(set(life.expected[0].values())) > 8, "the prompts should have different continuations"
    sums: dict[str, float] = {}
    for pod in life.pods("router"):
        figures = scrape(f"{pod['status']['podIP']}:{HTTP_PORT}")
        assert figures is not None
        sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
    assert sums[TRANSFERS] > 0, "disaggregation Always, and no KV went from prefill to decode"
    say(f"16 streams of {TOKENS} tokens in {time.monotonic() - started:.1f} s, {sums[TRANSFERS]:.0f} KV transfers")


@dataclass(frozen=True)
class Step:
    """`victims` names the pods that `action` may hit; it gets them with the busiest first. At least `carrying` of them
    have streams, so many that those that are hit cannot all be without."""

    name: str
    victims: Callable[[], set[str]]
    carrying: int
    action: Callable[[list[str]], None]


def test_streams_survive_what_happens_around_them(life: Life, chart: Chart) -> None:
    if not life.expected:
        life.expected = [undisturbed(life.address, TOKENS)]
    with Counters(life.cluster, life.namespace, SERVICE) as counters, Load(life.address, TOKENS) as load:
        for step in steps(life, chart):
            take(step, life, load, counters)
    life.wait_ready()
    streams = [stream for stream in load.streams if stream.ended is not None]
    say(f"{len(streams)} streams in all")
    assert not [stream for stream in streams if stream.failed]
    assert not [stream for stream in streams if life.is_altered(stream)]


def take(step: Step, life: Life, load: Load, counters: Counters) -> None:
    """Hits pods under streams, waits until these have ended and KV has moved anew, and prints what came of it."""
    victims = step.victims()
    on = wait_for(lambda: carrying(step.carrying, victims, life, load), "streams on the pods to hit", STEP_DEADLINE_S)
    started, before, first = time.monotonic(), counters.sums(), len(load.streams)
    hit = load.generating()
    step.action(sorted(on, key=lambda pod: -len(on[pod])))
    took, then = time.monotonic() - started, counters.sums()
    wait_for(lambda: all(stream.ended for stream in hit), "the streams that were hit to end", STEP_DEADLINE_S)
    wait_for(lambda: counters.sums()[TRANSFERS] > then[TRANSFERS], "KV to move after it", STEP_DEADLINE_S, poll_s=0.5)
    after = counters.sums()
    seen = [stream for stream in load.streams[first:] if stream.ended] + hit
    failed = [stream for stream in seen if stream.failed]
    altered = [stream for stream in seen if not stream.failed and life.is_altered(stream)]
    figures = {key: after[counter] - before[counter] for key, counter in COLUMNS.items()}
    figures |= {"failed": len(failed), "altered": len(altered)}
    row = " ".join(f"{key} {value:<4}" for key, value in figures.items())
    streams = "+".join(str(len(on[pod])) for pod in sorted(on, key=lambda pod: -len(on[pod])))
    say(f"{step.name:<26} {took:5.1f} s  streams on the pods {streams:<12} {row}")
    assert figures["KV transfers"] > 0, f"{step.name}: no KV went from prefill to decode"
    assert not failed, f"{step.name}: {[stream.error for stream in failed][:3]}"
    assert not altered, f"{step.name}: {altered[:2]}"


def carrying(least: int, victims: set[str], life: Life, load: Load) -> dict[str, list[Stream]]:
    """Streams past their first token and far from their end, by the pods that may be hit; `least` have some."""
    assert victims
    found = life.carried(stream for stream in load.generating() if stream.num_events <= YOUNG)
    young = {pod: [s for s in found.get(pod, ()) if s.generating and s.num_events <= YOUNG] for pod in victims}
    loaded = [pod for pod, streams in young.items() if streams]
    assert len(loaded) >= least, f"streams on {loaded} alone"
    return young


def steps(life: Life, chart: Chart) -> Iterator[Step]:
    """The disturbances, in order."""

    def all_of(*roles: str) -> Callable[[], set[str]]:
        return lambda: life.names(*roles)

    workers, everything = ("prefill", "decode"), ("router", "prefill", "decode")
    yield Step("scale decode 1 -> 3", all_of("decode"), 1, lambda _: scale(life, 3))
    yield Step("scale decode 3 -> 1", all_of("decode"), 2, lambda _: scale(life, 1))
    yield Step("roll, same fingerprint", all_of(*workers), 2, lambda _: roll_annotation(life))
    yield Step("roll, other weights", all_of(*workers), 2, lambda _: roll_weights(life))
    yield Step("delete the only decode pod", all_of("decode"), 1, lambda pods: replace(life, "decode", pods[0], delete))
    yield Step("evict a prefill pod", all_of("prefill"), 1, lambda pods: replace(life, "prefill", pods[0], evict))
    yield Step("delete a router pod", all_of("router"), 1, lambda pods: replace(life, "router", pods[0], delete))
    # These hit no pod of the service; its streams must not notice.
    yield Step("kill the leading operator", all_of(*everything), 3, lambda _: kill_leader(chart))
    yield Step("restart the API server", all_of(*everything), 3, lambda _: life.cluster.restart_apiserver())
    yield Step("helm upgrade", all_of(*everything), 3, lambda _: upgrade(life, chart))


def scale(life: Life, replicas: int) -> None:
    life.patch({"decode": {"replicas": replicas}})
    life.wait_pods("decode", replicas)


def roll_annotation(life: Life) -> None:
    """Changes what pods look like, not what they compute."""
    before = {role: life.uids(role) for role in ("prefill", "decode")}
    current = life.cluster.get("llmservice", SERVICE, life.namespace)["spec"]
    for role in before:
        current[role]["podTemplate"]["metadata"] = {"annotations": {"test/rolled": str(time.time())}}
    life.patch({role: {"podTemplate": current[role]["podTemplate"]} for role in before})
    for role, old in before.items():
        life.wait_pods(role, len(old), without=old)


def roll_weights(life: Life) -> None:
    """Changes the fingerprint: streams end with the weights they began with, later ones say something else."""
    before = {role: life.uids(role) for role in ("prefill", "decode")}
    life.patch({"model": {"uri": f"file://{MODELS_MOUNT}/other"}})
    for role, old in before.items():
        life.wait_pods(role, len(old), without=old)
    life.wait_ready()
    life.expected.append(undisturbed(life.address, TOKENS))
    assert life.expected[0] != life.expected[1], "the other weights say the same"


def replace(life: Life, role: str, victim: str, remove: Callable[[Life, str], None]) -> None:
    count = len(life.pods(role))
    uid = life.cluster.get("pod", victim, life.namespace)["metadata"]["uid"]
    remove(life, victim)
    life.wait_pods(role, count, without={uid})


def delete(life: Life, pod: str) -> None:
    life.cluster.kubectl("delete", "pod", pod, "-n", life.namespace, "--wait=false")


def evict(life: Life, pod: str) -> None:
    """As `kubectl drain` does: asks again while the disruption budget says no."""
    meta = {"name": pod, "namespace": life.namespace}
    body = json.dumps({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta})
    path = f"/api/v1/namespaces/{life.namespace}/pods/{pod}/eviction"
    wait_for(lambda: life.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=body), f"{pod} to be evicted", 60)


def kill_leader(chart: Chart) -> None:
    old = wait_for(chart.leader, "a leader", 30)
    chart.cluster.kubectl("delete", "pod", old, "-n", chart.namespace, "--grace-period=0", "--force")
    wait_for(lambda: chart.leader() not in ("", old), "another leader", 40)


def upgrade(life: Life, chart: Chart) -> None:
    """A new operator, and not one pod of a service is replaced by it."""
    before = life.all_uids()
    chart.upgrade("podAnnotations.test/upgraded=yes")
    wait_for(chart.leader, "a leader of the new release", 40)
    assert life.all_uids() == before
