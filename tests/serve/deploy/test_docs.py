"""The page on deployments: its commands parse, and those that need no file of yours run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stretto.cli import application

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE.splitlines() if line.startswith("stretto plan")]


def arguments(line: str) -> list[str]:
    return shlex.split(line, comments=True)[1:]


def test_the_page_has_commands() -> None:
    assert len(LINES) >= 6


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line: str) -> None:
    group = typer.main.get_command(application())
    command = group.commands["plan"]  # type: ignore[attr-defined]
    assert command.make_context("plan", arguments(line)[1:]).params["on"].name.endswith(".yaml")


@pytest.mark.parametrize("extra", [["--emit", "vllm"], ["--what-if", "link=2x,memory=+16GB", "--json"]])
def test_a_command_runs(extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    trace = tmp_path / "requests.csv"
    trace.write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i * 0.1},{100 + i},20\n" for i in range(20))
    )
    chosen = ["plan", "jobs/serve-llama-70b.yaml", "--on", "clusters/8xh100.yaml", "--trace", str(trace), "--top", "2"]
    done = CliRunner().invoke(application(), [*chosen, *extra])
    assert done.exit_code == 0, done.output
    if "--emit" in extra:
        assert "vllm serve meta-llama/Llama-3.1-70B " in done.output
        assert "20 requests" in done.output.replace("\n", " ")
    else:
        assert '"objective": "throughput"' in done.output


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in LINES if "--trace" not in line])
def test_every_command_runs(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(application(), arguments(line))
    assert done.exit_code == 0, done.output
