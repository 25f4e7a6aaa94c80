"""Options of the whole test run; pytest reads them only from here.

Owns: command-line options. Must not: hold fixtures (they lie beside their tests).
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cluster")
    group.addoption("--kubeconfig", type=Path, help="use this cluster instead of starting one")
    group.addoption("--control-image", help="image of operator and router in that cluster")
    group.addoption("--worker-image", help="image of the workers in that cluster")
