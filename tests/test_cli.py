"""The command table: fast help, an example for every command, exit status 0, 1, 2."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lanewise import __version__
from lanewise.cli import COMMANDS, main

SAMPLE = str(Path(__file__).parent.parent / "deploy" / "samples" / "fable.yaml")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, function = COMMANDS[name][0].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  lanewise {name}" in capsys.readouterr().out


def test_help_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, lanewise.cli; lanewise.cli.main(['--help']); print([m for m in sys.argv[1:] if m in sys.modules])"
    )
    heavy = ("torch", "grpc", "pydantic", "yaml", "aiohttp", "rich", "asyncio", "numpy", "matplotlib")
    out = subprocess.run((sys.executable, "-c", code, *heavy), capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_bad_usage_is_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sreve"]) == 2
    assert "no command 'sreve'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["version", "--nope"])
    assert ended.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"lanewise {__version__}\n"
    assert main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == __version__


def test_module_runs_as_a_program() -> None:
    done = subprocess.run((sys.executable, "-m", "lanewise", "version"), capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SAMPLE]) == 0
    assert capsys.readouterr().out == f"{SAMPLE}: LLMService fable is sound\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text(Path(SAMPLE).read_text().replace("ttft: 400ms", "ttft: 0.4"))
    assert main(["check", str(bad)]) == 1
    assert "spec.slo.ttft: expected a duration such as 400ms" in capsys.readouterr().out
    assert main(["check", str(bad), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["line"], problem["field"]) == (11, "spec.slo.ttft")
    assert main(["check", str(tmp_path / "none.yaml")]) == 2
    other = tmp_path / "other.yaml"
    other.write_text("apiVersion: v1\nkind: Secret\n")
    assert main(["check", str(other)]) == 1


def test_check_full_hashes_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    claim = tmp_path / "claim.yaml"
    claim.write_text(Path(SAMPLE).read_text().replace("builtin://fable", "pvc://weights/dir"))
    assert main(["check", str(claim), "--full"]) == 2
    assert "Kubernetes claim" in capsys.readouterr().err
    gone = tmp_path / "gone.yaml"
    gone.write_text(Path(SAMPLE).read_text().replace("builtin://fable", "file:///no/such/model"))
    assert main(["check", str(gone), "--full"]) == 2
    assert main(["check", SAMPLE, "--full", "--json"]) == 0
    (service,) = json.loads(capsys.readouterr().out)["resources"]
    assert len(service["weights"]) >= 32


def test_a_reader_that_leaves_is_no_failure() -> None:
    code = "import sys\nfrom lanewise.cli import main\nsys.exit(main(['version']))"
    with subprocess.Popen((sys.executable, "-c", code), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0
