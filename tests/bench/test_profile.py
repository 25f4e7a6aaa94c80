"""`lanewise profile` on a real engine: a file that the simulator reads, and a pool left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lanewise.bench.profile import main
from lanewise.config import WorkerConfig
from lanewise.engine.measure import measure, shapes
from lanewise.engine.runner import Engine
from lanewise.errors import ConfigError
from lanewise.sim.service import load_profile


def test_an_engine_is_measured_into_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cpu.yaml"
    flags = ["--model", "builtin://fable", "--threads", "1", "--kv-cache-bytes", str(64 * 2**20)]
    assert main(["--repeats", "1", "--output", str(output), *flags]) == 0
    assert capsys.readouterr().out == ""
    profile = load_profile(str(output), tmp_path)
    assert profile.kv_bytes_per_token == 5120
    assert profile.kv_capacity_tokens * 5120 <= 64 * 2**20
    times = [profile.cost.alone(tokens) for tokens in (1, 64, 512)]
    assert 1e-5 < times[0] < times[1] < times[2] < 10
    assert yaml.safe_load(output.read_text())["notes"]["batches"] > 30


def test_measuring_leaves_the_pool_as_it_was_and_skips_what_does_not_fit() -> None:
    config = WorkerConfig(model="builtin://fable", threads=1, kv_cache_bytes=2**20, max_context_tokens=128)
    engine = Engine.load(config)
    before = engine.pool.usage()
    measured = measure(engine, repeats=1)
    assert engine.pool.usage() == before
    assert engine.pool.audit([]) == []
    room = before.capacity_tokens // 2
    assert 0 < len(measured) < len(list(shapes()))
    assert all(shape.tokens <= room and seconds > 0 for shape, seconds in measured)


def test_a_worker_address_and_engine_flags_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="no engine to configure"):
        main(["--worker", "127.0.0.1:1", "--model", "x"])
