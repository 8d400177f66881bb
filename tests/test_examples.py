"""What the documents and example files say holds: files load, code compiles, commands and options exist, jobs plan."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import stretto
from stretto.cli import application
from stretto.core.errors import UserError
from stretto.hardware import catalog

ROOT = Path(__file__).parent.parent
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "clusters").glob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def name(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


YAML_BLOCKS = [
    pytest.param(text, id=f"{document.name} {number}")
    for document in DOCUMENTS
    for number, text in enumerate(blocks(document, "yaml"))
    if "kind" in yaml.safe_load(text)
]
ADDING = ROOT / "docs" / "adding.md"
PYTHON_BLOCKS = blocks(ROOT / "README.md", "python")
COMMAND_LINES = [
    line
    for text in blocks(ROOT / "README.md", "sh")
    for line in text.splitlines()
    if line.split("#")[0].split()[:1] == ["stretto"]
]


def test_there_are_examples() -> None:
    assert JOBS
    assert CLUSTERS
    assert YAML_BLOCKS
    assert PYTHON_BLOCKS
    assert len(COMMAND_LINES) >= 4


@pytest.mark.parametrize("file", JOBS, ids=name)
def test_jobs_load(file: Path) -> None:
    assert stretto.load(file).kind == yaml.safe_load(file.read_text())["kind"]


@pytest.mark.parametrize("file", CLUSTERS, ids=name)
def test_clusters_load(file: Path) -> None:
    cluster = stretto.load_cluster(file)
    assert cluster.name == file.stem
    assert cluster.devices()


@pytest.mark.parametrize("text", YAML_BLOCKS)
def test_jobs_in_documents_load(text: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
    assert stretto.load(tmp_path / "job.yaml").kind == yaml.safe_load(text)["kind"]


@pytest.mark.parametrize("text", PYTHON_BLOCKS)
def test_python_in_the_readme_uses_what_exists(text: str) -> None:
    compile(text, "README.md", "exec")
    used = set(re.findall(r"\bst\.(\w+)", text))
    assert used
    assert [name for name in used if not hasattr(stretto, name)] == []
    assert used <= set(stretto.__all__)
    for file in re.findall(r'"([\w/]+\.yaml)"', text):
        assert (ROOT / file).exists()


def test_the_page_on_adding_is_true(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its Python runs from top to bottom; what it registers is forgotten afterwards."""
    from stretto.claims import registry
    from stretto.serve.joining import JOININGS

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(registry, "_declared", dict(registry._declared))
    before = dict(JOININGS)
    try:
        names: dict[str, Any] = {"__name__": "adding"}
        for text in blocks(ADDING, "python"):
            exec(compile(text, ADDING.name, "exec"), names)
    finally:
        JOININGS.clear()
        JOININGS.update(before)
    assert "shortest-answer joining" in capsys.readouterr().out
    (row,) = [row for row in registry.run_claims("flover", quick=True) if row.name == "weight_read"]
    assert row.verdict == "held"


def test_the_device_on_the_page_on_adding_is_the_catalogs() -> None:
    (text,) = blocks(ADDING, "yaml")
    document = yaml.safe_load(text)
    for name, fields in document["entries"].items():
        sources = catalog._Sources("adding.md", document["sources"])
        assert catalog._device(name, fields, sources) == catalog.device(name)


def parse(line: str) -> dict[str, Any]:
    """The values of a command line, parsed by the product's own parser and not run."""
    _, command, *arguments = shlex.split(line, comments=True)
    group: Any = typer.main.get_command(application())
    return dict(group.commands[command].make_context(command, arguments).params)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_in_the_readme_parse(line: str) -> None:
    values = parse(line)
    assert "as_json" in values
    for value in values.values():
        if isinstance(value, Path) and value.parts[0] in ("jobs", "clusters"):
            assert (ROOT / value).exists()


def test_a_command_line_with_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --tops"):
        parse("stretto plan jobs/quickstart.yaml --tops 3")
    with pytest.raises(KeyError):
        parse("stretto train jobs/quickstart.yaml")


@pytest.mark.parametrize("file", JOBS, ids=name)
def test_jobs_plan_on_a_node_of_eight(file: Path) -> None:
    job = stretto.load(file)
    if job.kind == "train":  # every layout, with one pass each
        job = replace(job, recompute="never", layout=replace(job.layout, micro_batch=1))
    ranking = stretto.plan(job, on=ROOT / "clusters" / "8xa100.yaml")
    throughput = ranking.weighed[0].prediction.metrics["throughput"].value
    assert 0 < throughput.low <= throughput.value <= throughput.high < float("inf")
    trace = stretto.simulate(ranking.best)
    assert trace.makespan > 0
    assert trace.overlaps() == []


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in JOBS if "kind: train" in file.read_text()], ids=name)
def test_training_jobs_run_and_learn(file: Path, tmp_path: Path) -> None:
    """As a user runs them: planned for this machine, trained to the end, with a report."""
    result = stretto.run(stretto.plan(stretto.load(file)).best, ctx=stretto.Context(output=tmp_path))
    assert not result.interrupted
    assert result.outputs[-1]["loss"] < result.outputs[0]["loss"]
    assert {"html", "curves"} <= set(result.files)


@pytest.mark.slow
def test_the_load_is_served_here(tmp_path: Path) -> None:
    """As a user runs it: timed, planned for this machine, served by worker processes, with a report."""
    best = stretto.plan(stretto.load(ROOT / "jobs" / "serve-load-here.yaml")).best
    result = stretto.run(best, ctx=stretto.Context(output=tmp_path))
    assert not result.interrupted
    assert len(result.outputs) == best.job.load.requests
    assert all(0 < output["first_token_s"] <= output["latency_s"] for output in result.outputs)
    assert {"html", "perfetto_measured"} <= set(result.files)


def test_a_name_that_does_not_exist_is_not_found() -> None:
    assert not hasattr(stretto, "conduct")
    with pytest.raises(UserError, match="no such file"):
        stretto.load(ROOT / "jobs" / "no-such-job.yaml")


def test_the_page_on_workflows_is_true(tmp_path: Path) -> None:
    """Its Python, run from top to bottom as a script, prints what the page says it does."""
    page = ROOT / "docs" / "workflows.md"
    (tmp_path / "example.py").write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == (blocks(page, "text")[0], "")
    for text in blocks(page, "py"):
        compile(text, page.name, "exec")
