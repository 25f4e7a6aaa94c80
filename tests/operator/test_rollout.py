"""Who rolls first, and with what a held role goes on."""

from copy import deepcopy
from typing import Any

from lanewise.operator import rollout
from lanewise.operator.plan import plan
from lanewise.operator.plan_types import PlanContext
from lanewise.operator.rollout import Phase, complete, decide, held, newest, revision_of, surplus
from lanewise.spec import builtin_service
from lanewise.spec_status import RuntimeStatus

RUNTIME = RuntimeStatus(version="0.1.0", rendering=1, control_image="c", worker_image="w")
MADE = plan(builtin_service(), PlanContext("n", "u", RUNTIME, "r"))


def deployment(print_: str, *, done: bool = True, stalled: bool = False) -> dict[str, Any]:
    conditions = []
    if stalled:
        conditions = [{"type": "Progressing", "status": "False", "reason": rollout.STALLED, "message": "timed out"}]
    counts = 2 if done else 1
    return {
        "metadata": {"name": "chat-decode", "generation": 3},
        "spec": {
            "replicas": 2,
            "template": {"metadata": {"annotations": {"lanewise.io/fingerprint": print_}}},
        },
        "status": {
            "observedGeneration": 3,
            "replicas": 2,
            "updatedReplicas": counts,
            "availableReplicas": counts,
            "conditions": conditions,
        },
    }


def both(prefill: dict[str, Any] | None, decode: dict[str, Any] | None) -> dict[str, dict[str, Any] | None]:
    return {"router": None, "prefill": prefill, "decode": decode}


def test_settled() -> None:
    assert decide("a", both(deployment("a"), deployment("a"))) == rollout.SETTLED


def test_a_new_fingerprint_goes_to_decode_first() -> None:
    found = decide("b", both(deployment("a"), deployment("a")))
    assert (found.phase, found.hold) == (Phase.DECODE_FIRST, frozenset({"prefill"}))
    assert decide("b", both(deployment("a"), deployment("b", done=False))).hold == {"prefill"}


def test_prefill_follows_when_decode_is_complete() -> None:
    found = decide("b", both(deployment("a"), deployment("b")))
    assert (found.phase, found.hold) == (Phase.PREFILL_NEXT, frozenset())
    assert decide("b", both(deployment("b", done=False), deployment("b"))).phase is Phase.ROLLING


def test_a_template_the_controller_has_not_seen_is_not_complete() -> None:
    seen = deployment("b")
    seen["metadata"]["generation"] = 4
    assert not complete(seen)
    assert decide("b", both(deployment("a"), seen)).hold == {"prefill"}


def test_old_pods_that_remain_are_not_complete() -> None:
    surging = deployment("b")
    surging["status"]["replicas"] = 3
    assert not complete(surging)


def test_a_change_taken_back_holds_nobody() -> None:
    assert decide("a", both(deployment("a"), deployment("b", done=False))).hold == frozenset()


def test_the_same_fingerprint_rolls_both_at_once() -> None:
    found = decide("a", both(deployment("a", done=False), deployment("a", done=False)))
    assert (found.phase, found.hold) == (Phase.ROLLING, frozenset())


def test_a_stalled_decode_keeps_prefill_where_it_is() -> None:
    found = decide("b", both(deployment("a"), deployment("b", done=False, stalled=True)))
    assert found.hold == {"prefill"}
    assert found.stalled == "Deployment chat-decode: timed out"


def test_the_first_creation_holds_nobody() -> None:
    assert decide("a", both(None, None)).hold == frozenset()
    assert decide("a", both(None, deployment("b"))).hold == frozenset()


def test_revisions_number_themselves_and_the_oldest_go() -> None:
    kept: list[dict[str, Any]] = []
    for index in range(8):
        made = deepcopy(MADE.deployments["decode"])
        made["spec"]["template"]["spec"]["containers"][0]["image"] = f"w:{index}"
        kept.append(revision_of(made, "config", [item["revision"] for item in kept]))
    assert [item["revision"] for item in kept] == list(range(1, 9))
    assert len({item["metadata"]["name"] for item in kept}) == 8
    assert newest(kept, "decode") is kept[-1]
    assert newest(kept, "prefill") is None
    assert surplus(kept, "decode") == kept[:3]


def test_scaling_is_no_new_revision() -> None:
    wanted = MADE.deployments["decode"]
    more = deepcopy(wanted)
    more["spec"]["replicas"] = 9
    assert revision_of(more, "c", []) == revision_of(wanted, "c", [])


def test_a_held_role_scales() -> None:
    old = revision_of(MADE.deployments["prefill"], "c", [])["data"]["deployment"]
    kept = held(old, 5)
    assert kept["spec"] == {**old["spec"], "replicas": 5}
    assert "replicas" not in held(old, None)["spec"]
