"""Model URIs, the limits of the machine, and what an engine says of itself."""

from __future__ import annotations

import os
from fnmatch import fnmatch

import pytest
import torch

from lanewise.engine import machine
from lanewise.engine.sources import resolve
from lanewise.errors import ConfigError


def test_local_forms(tmp_path, monkeypatch):
    directory = tmp_path / "a model"
    directory.mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve(str(directory))
    (directory / "config.json").write_text("{}")
    assert resolve(str(directory)) == directory
    assert resolve(f"file://{str(directory).replace(' ', '%20')}") == directory
    monkeypatch.chdir(tmp_path)
    assert resolve("a model") == directory
    assert resolve("builtin://fable").name == "fable"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("builtin://nothing", "no built-in model named 'nothing'"),
        ("builtin://../engine", "no built-in model"),
        ("s3://bucket/model", "unknown kind of model"),
        ("file://elsewhere/model", "names this machine"),
        ("/does/not/exist", "is not a directory"),
        ("hf://name-without-owner", "write hf://owner/name"),
    ],
)
def test_refusals(uri, words):
    with pytest.raises(ConfigError, match=words):
        resolve(uri)


def test_hub_offline_says_what_to_do(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"not in the local cache.*hf download owner/name --revision main"):
        resolve("hf://owner/name")


def test_hub_downloads_report_progress_and_are_filtered(tmp_path, monkeypatch):
    """The hub's own client is replaced at its one entry point: no network in tests."""
    import huggingface_hub

    reports = []

    def snapshot_download(repo, *, revision, allow_patterns, tqdm_class):
        assert (repo, revision) == ("owner/name", "v1")
        wanted = ["model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"]
        assert all(any(fnmatch(name, pattern) for pattern in allow_patterns) for name in wanted)
        unwanted = ["pytorch_model.bin", "consolidated.safetensors"]
        assert not any(fnmatch(name, pattern) for name in unwanted for pattern in allow_patterns)
        with tqdm_class(total=10, unit="B", name="x") as bar:
            bar.update(4)
            bar.update(6)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("hf://owner/name", "v1", lambda *report: reports.append(report)) == tmp_path
    assert reports == [("download", 4, 10), ("download", 10, 10)]


def test_memory_limit_is_the_smaller_of_machine_and_cgroup(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (str(limit), str(tmp_path / "missing")))
    cpu = torch.device("cpu")
    physical = machine.memory_bytes(cpu)
    limit.write_text("max\n")
    assert machine.memory_bytes(cpu) == physical
    limit.write_text("1000000\n")
    assert machine.memory_bytes(cpu) == 1_000_000


def test_devices(monkeypatch):
    assert machine.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto") == torch.device("cpu")
    for name, words in (("cuda", "is not there"), ("mps", "not supported"), ("tpu7x", "use auto, cpu")):
        with pytest.raises(ConfigError, match=words):
            machine.choose_device(name)


def test_a_worker_binds_itself_to_its_cores():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    core = min(before)
    try:
        assert machine.bind_cores((core,), 0) == 1
        assert os.sched_getaffinity(0) == {core}
        assert torch.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
    with pytest.raises(ConfigError, match="cores \\[4096\\] are not available"):
        machine.bind_cores((4096,), 0)


def test_the_built_in_model(load, driver):
    from lanewise.request import Sampling

    progress = []
    engine = load("builtin://fable")
    assert engine.pool.layout.dtype == "float32"
    engine.warm_up()
    assert engine.pool.usage().used_tokens == 0
    assert engine.memory_bytes > 0
    assert engine.eos_ids
    drive = driver()
    (output,) = drive.run(engine, drive.open([[10, 20, 30]], Sampling(max_tokens=8, temperature=0.0)))
    assert len(output) == 8
    with pytest.raises(ConfigError, match="exceeds the model's own"):
        load("builtin://fable", max_context_tokens=10**7)
    from lanewise.config import WorkerConfig
    from lanewise.engine.runner import Engine

    config = WorkerConfig(threads=1, kv_cache_bytes=24 << 20, device="cpu", max_context_tokens=512)
    limited = Engine.load(config, lambda *report: progress.append(report))
    assert limited.max_context_tokens == 512
    assert limited.fingerprint == engine.fingerprint
    assert {"load"} <= {what for what, _, _ in progress} <= {"load", "pack"}
    assert progress[-1][1] == progress[-1][2]


def test_steps_refuse_work_that_cannot_be(small_engine, driver):
    from lanewise.engine.runner import Work
    from lanewise.request import Sampling

    (seq,) = driver().open([[1, 2, 3]], Sampling(max_tokens=1))
    assert small_engine.step([]) == []
    with pytest.raises(ValueError, match="cannot compute 4 of 3"):
        small_engine.step([Work(seq, 4)])
    with pytest.raises(ValueError, match="have not been ensured"):
        small_engine.step([Work(seq, 3)])
