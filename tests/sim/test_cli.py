"""`lanewise sim` and `lanewise plan` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lanewise.sim import cli, plan

ROOT = Path(__file__).parent.parent.parent
SERVICE = str(ROOT / "deploy" / "samples" / "sim-h200-qwen2.5-32b.yaml")
AZURE = str(ROOT / "tests" / "data" / "traces" / "azure_llm_2023_conv_600.csv")
MOONCAKE = str(ROOT / "tests" / "data" / "traces" / "mooncake_conversation_400.csv")


def sim(*args: str) -> int:
    return cli.main([SERVICE, *args])


def test_json_has_the_documented_fields(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert sim("--trace", AZURE, "--limit", "200", "--bound", "--slo-ttft", "400ms", "--json", str(out)) == 0
    result = json.loads(out.read_text())
    assert result["policy"] == "lanewise"
    assert result["requests"] == 200
    assert set(result["ttft_ms"]) == {"mean", "p50", "p90", "p99", "max"}
    assert result["bound"]["mean_ttft_ms"] <= result["ttft_ms"]["mean"]
    assert result["bound"]["slo_attainment"] >= result["slo_attainment"]
    assert result["tpot_ms"]["mean"] > 10
    assert set(result["utilisation"]) == {"prefill", "decode"}


def test_several_policies_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / "ttft.png"
    policies = ["--policy", "lanewise", "--policy", "fcfs-8192+round-robin", "--policy", "laps-8192+random+laps-pools"]
    args = ["--trace", AZURE, "--limit", "150", "--one-token", "--prefill", "2", "--plot", str(image), *policies]
    assert sim(*args) == 0
    shown = capsys.readouterr().out
    assert "fcfs-8192+round-robin" in shown
    assert "laps-8192+random+laps-pools" in shown
    assert image.stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--trace", MOONCAKE], "--cache ideal"),
        (["--trace", AZURE, "--policy", "fifo"], "unknown batch policy"),
        (["--trace", AZURE, "--policy", "lanewise+psychic"], "unknown routing"),
        (["--trace", AZURE, "--rate-scale", "0"], "--rate-scale"),
        (["--trace", AZURE, "--cache", "lru"], "--cache"),
        (["--trace", AZURE, "--bound", "--max-queue-wait", "1s"], "--bound"),
        (["--trace", AZURE, "--profile", "{model: gpt-9, device: h200}"], "gpt-9"),
    ],
)
def test_bad_usage_is_status_2_and_says_what(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim(*args) == 2
    assert said in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (cli.main, plan.main):
        with pytest.raises(SystemExit) as stopped:
            command(["--help"])
        assert stopped.value.code == 0
        assert "example:" in capsys.readouterr().out


def test_malformed_traces_name_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("arrival_s,prompt_tokens\n0.0,5\n1.0,0\n")
    assert sim("--trace", str(bad)) == 2
    assert "row 2" in capsys.readouterr().err
    bad.write_text("when,what\n1,2\n")
    assert sim("--trace", str(bad)) == 2
    assert "prompt_tokens" in capsys.readouterr().err


def test_plan_finds_the_cheapest(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    args = ["--trace", AZURE, "--limit", "150", "--slo-ttft", "1s", "--json", str(out)]
    assert plan.main([SERVICE, *args, "--max-instances", "4", "--compare", "2"]) == 0
    found = json.loads(out.read_text())
    kinds = {row["kind"] for row in found["clusters"]}
    assert kinds == {"split", "mixed"}
    assert all(row["slo_attainment"] >= 0.95 for row in found["clusters"])
    prices = [row["price_per_hour"] for row in found["clusters"]]
    assert prices == sorted(prices)
    assert {row["equal"] for row in found["compare"]} == {"reference", "cost", "power"}


def test_plan_says_when_nothing_holds(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--trace", AZURE, "--limit", "60", "--slo-ttft", "20ms", "--max-instances", "2"]
    assert plan.main([SERVICE, *args]) == 1
    assert "no cluster" in capsys.readouterr().err
