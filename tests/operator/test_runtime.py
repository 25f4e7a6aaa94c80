"""The pin of a service's runtime: a newer operator changes nothing until it is asked to."""

from typing import Any

import pytest

from lanewise.errors import ConfigError
from lanewise.operator import runtime
from lanewise.operator.runtime import choose_runtime, own_runtime, retag
from lanewise.spec import LLMService, builtin_service
from lanewise.spec_status import RuntimeStatus

PINNED = RuntimeStatus(version="0.1.0", rendering=1, control_image="r/control:0.1.0", worker_image="r/worker:0.1.0")


def service(version: str | None = None) -> LLMService:
    data: dict[str, Any] = builtin_service().model_dump(by_alias=True, exclude_none=True, exclude={"status"})
    data["spec"]["runtime"] = {} if version is None else {"version": version}
    return LLMService.model_validate(data)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> RuntimeStatus:
    """Of an operator one release on."""
    monkeypatch.setattr(runtime, "__version__", "0.2.0")
    monkeypatch.setitem(runtime.RENDERINGS, "0.2.0", 2)
    monkeypatch.setattr(runtime, "RENDERING", 2)
    return own_runtime("r/control@sha256:aa", "r:5000/lw/worker:0.2.0")


def test_a_new_service_gets_what_the_operator_has(own: RuntimeStatus) -> None:
    assert choose_runtime(service(), None, own) == own
    assert (own.version, own.rendering) == ("0.2.0", 2)


def test_an_old_service_keeps_what_it_has(own: RuntimeStatus) -> None:
    assert choose_runtime(service(), PINNED, own) == PINNED
    assert choose_runtime(service("0.1.0"), PINNED, own) == PINNED


def test_until_it_asks_for_more(own: RuntimeStatus) -> None:
    assert choose_runtime(service("0.2.0"), PINNED, own) == own


def test_a_new_service_may_ask_for_an_old_version(own: RuntimeStatus) -> None:
    made = choose_runtime(service("0.1.0"), None, own)
    assert (made.version, made.rendering) == ("0.1.0", 1)
    assert (made.control_image, made.worker_image) == ("r/control:0.1.0", "r:5000/lw/worker:0.1.0")


def test_a_version_nobody_knows_is_refused_with_those_that_are(own: RuntimeStatus) -> None:
    with pytest.raises(ConfigError, match=r"spec\.runtime\.version: expected one of 0\.1\.0, 0\.2\.0, got 9\.9\.9"):
        choose_runtime(service("9.9.9"), PINNED, own)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("worker", "worker:2"),
        ("ghcr.io/lanewise/worker:1", "ghcr.io/lanewise/worker:2"),
        ("r:5000/worker", "r:5000/worker:2"),
        ("r:5000/worker:1@sha256:aa", "r:5000/worker:2"),
    ],
)
def test_retag(image: str, expected: str) -> None:
    assert retag(image, "2") == expected
