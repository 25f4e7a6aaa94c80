"""One default service for all tests that only read from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.service import Service, running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def audited(service: Service) -> Iterator[Service]:
    """The service, with proof afterwards that the test left no block behind."""
    yield service
    service.audit()
