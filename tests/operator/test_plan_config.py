"""The rendered files are what the processes read."""

from pathlib import Path

import pytest
import yaml

from lanewise.config import RouterConfig, WorkerConfig
from lanewise.operator.plan import plan
from lanewise.operator.plan_types import PlanContext
from lanewise.spec_status import RuntimeStatus
from lanewise.spec_yaml import read_service

SERVICES = sorted((Path(__file__).parent / "services").glob("*.yaml"))
RUNTIME = RuntimeStatus(version="0.1.0", rendering=1, control_image="c", worker_image="w")


@pytest.mark.parametrize("file", SERVICES, ids=lambda path: path.stem)
def test_processes_understand_their_configuration(file: Path) -> None:
    made = plan(read_service(file), PlanContext("chat", "", RUNTIME, "lanewise-router", commit="0" * 40))
    for role, text in made.config.items():
        kind = RouterConfig if role == "router" else WorkerConfig
        kind(**yaml.safe_load(text))
