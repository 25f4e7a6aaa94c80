"""One small model for the tests of the decode loop, and rigs that are closed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lanewise.engine.runner import Engine
from tests.decode_worker.rig import Rig, load
from tests.e2e import models


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_model("mistral", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def reference(model: Path) -> Engine:
    """An engine that answers one request at a time and keeps no cache."""
    return load(model, 4096)


@pytest.fixture(params=["plain", "ahead", "late"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_rig(model: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(mode: str, pool_tokens: int = 4096, **options: Any) -> Rig:
        rigs.append(Rig(load(model, pool_tokens), mode, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
