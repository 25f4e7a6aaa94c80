"""What every test shares."""

from __future__ import annotations

import asyncio
import contextlib

import pytest


def pytest_sessionfinish(session: pytest.Session) -> None:
    # grpc.aio objects that are collected outside a running loop ask the policy for one and never close it; with
    # warnings as errors that would fail a green run at its very end.
    with contextlib.suppress(RuntimeError):
        loop = asyncio.get_event_loop_policy().get_event_loop()
        loop.close()
    asyncio.set_event_loop(None)
