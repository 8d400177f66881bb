"""The commands from start to end on a tiny job: probe, plan, simulate, run, Ctrl-C, and the same from Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.core.eventlog import EventLog, replay
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig
from tests.workflow.portfolio.test_domain import FILE as PORTFOLIO

pytestmark = pytest.mark.timeout(300)

THREADS = min(2, os.cpu_count() or 1)
JOB = f"""\
kind: serve
max_new_tokens: 6
slots: 2
dtype: bf16
threads: {THREADS}
joining: continuous
layout: pages
instances: 1
prompts:
  - What is the capital of France?
  - Name a colour.
  - Say hello.
"""
LONG = JOB.replace("max_new_tokens: 6", "max_new_tokens: 400\nignore_eos: true")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that all tests here share, so that the machine is measured and the model calibrated once."""
    return tmp_path_factory.mktemp("cache")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "stretto", *map(str, arguments)]


def ended(cache: Path, cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command that was run to its end."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=200, cwd=cwd, env=environment, check=False
    )


def stretto_json(cache: Path, cwd: Path, *arguments: str | Path) -> Any:
    """What a command prints with --json; it must succeed and print nothing else."""
    done = ended(cache, cwd, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def planned(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with job.yaml and plan.yaml, and what `plan` printed."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "job.yaml").write_text(JOB)
    return folder, stretto_json(cache, folder, "plan", "job.yaml", "--save", "plan.yaml")


@pytest.fixture(scope="session")
def ran(cache: Path, planned: tuple[Path, Any]) -> tuple[Path, Any]:
    """The folder of a real run's report, and what `run` printed."""
    folder, _ = planned
    return folder / "out", stretto_json(cache, folder, "run", "plan.yaml", "-o", "out")


def test_version_and_help(tmp_path: Path) -> None:
    version = subprocess.run(command("--version"), capture_output=True, text=True, timeout=60, check=True)
    assert version.stdout == f"stretto {stretto.__version__}\n"
    shown = subprocess.run(command("--help"), capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(name in shown for name in ("probe", "plan", "simulate", "run"))


def test_probe_names_the_peaks_of_this_machine(cache: Path, tmp_path: Path) -> None:
    cluster = stretto_json(cache, tmp_path, "probe", "--save", "here.yaml")
    loaded = stretto.load_cluster(tmp_path / "here.yaml")
    (device,) = loaded.devices().values()
    assert device.bandwidth > 1e8
    assert set(device.peak_flops) >= {"fp32"}
    assert all(peak > 1e8 for peak in device.peak_flops.values())
    assert stretto_json(cache, tmp_path, "probe") == cluster == json.loads(json.dumps(loaded.to_dict()))


def test_plan_ranks_and_saves(planned: tuple[Path, Any]) -> None:
    folder, ranking = planned
    (best,) = ranking["plans"]
    assert best["choices"]["slots"] == 2
    assert best["choices"]["threads"] == THREADS
    assert (ranking["rejected"], ranking["pruned"]) == ([], [])
    assert "throughput" in ranking["why"]
    saved = stretto.load(folder / "plan.yaml")
    assert (saved.choices.dtype, saved.choices.joining) == ("bf16", "continuous")
    assert saved.job == stretto.load(folder / "job.yaml")


def test_simulate_writes_pictures(cache: Path, planned: tuple[Path, Any]) -> None:
    folder, ranking = planned
    shown = stretto_json(cache, folder, "simulate", "plan.yaml", "-o", "simulated")
    assert set(shown["files"]) >= {"html", "perfetto_simulated"}
    for file in shown["files"].values():
        assert (folder / file).stat().st_size > 1000
    events = json.loads((folder / shown["files"]["perfetto_simulated"]).read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == shown["trace"]["spans"]
    assert sum(e["dur"] for e in spans) / 1e6 == pytest.approx(sum(shown["trace"]["busy_s"].values()))
    assert "decode" in {event["name"] for event in spans}
    assert shown["metrics"].keys() == ranking["plans"][0]["metrics"].keys()


def test_a_portfolio_prints_json(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(PORTFOLIO))
    ranking = stretto_json(cache, tmp_path, "plan", "job.yaml", "--save", "plan.yaml")
    assert ranking["objective"] == "completion"
    result = stretto_json(cache, tmp_path, "run", "plan.yaml", "-o", "out")
    assert {sample["step"] for sample in result["outputs"]} <= {"a", "b"}
    assert result["outputs"]


def test_run_answers_and_compares(ran: tuple[Path, Any]) -> None:
    folder, result = ran
    assert [output["prompt"] for output in result["outputs"]] == list(stretto.load(folder.parent / "job.yaml").prompts)
    assert all(output["text"].strip() for output in result["outputs"])
    assert all(1 <= output["tokens"] <= 6 for output in result["outputs"])
    assert result["tokens"] == sum(output["tokens"] for output in result["outputs"])
    assert result["predicted_s"] > 0
    assert result["measured_s"] > 0
    assert result["error"] == pytest.approx(result["predicted_s"] / result["measured_s"] - 1)
    assert {row["phase"] for row in result["phases"]} >= {"prefill", "decode", "host"}
    assert not result["interrupted"]
    first = [output["first_token_s"] for output in result["outputs"]]
    assert all(0 < seconds <= result["measured_s"] for seconds in first)


def test_run_writes_its_report(ran: tuple[Path, Any]) -> None:
    folder, result = ran
    assert set(result["files"]) >= {"html", "events", "perfetto_simulated", "perfetto_measured"}
    assert {Path(file).parent for file in result["files"].values()} == {Path("out")}
    for file in result["files"].values():
        assert (folder.parent / file).stat().st_size > 500
    measured = json.loads((folder / "measured.perfetto.json").read_text())["traceEvents"]
    assert max(e["ts"] + e.get("dur", 0) for e in measured if "ts" in e) / 1e6 == pytest.approx(result["measured_s"])


def test_a_real_run_replays_decision_by_decision(ran: tuple[Path, Any]) -> None:
    log = EventLog.load(ran[0] / "events.jsonl")
    result = replay(log, Scheduler(SchedulerConfig(**log.header)))
    assert result.different == ()
    assert result.decisions == len(log) > 3
    work = [entry.decision for entry in log if entry.decision["idle_until"] is None]
    chunks = [chunk for decision in work for chunk in decision["prefill"]]
    assert {request for request, *_ in chunks} == {0, 1, 2}


def test_a_scheduler_with_other_settings_decides_otherwise(ran: tuple[Path, Any]) -> None:
    log = EventLog.load(ran[0] / "events.jsonl")
    assert not replay(log, Scheduler(SchedulerConfig(**{**log.header, "slots": 1}))).equal


def test_ctrl_c_ends_with_what_is_done(cache: Path, planned: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(LONG)
    started = subprocess.Popen(
        command("run", "job.yaml", "-o", "out", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )
    try:
        # The folder is made when planning is over; then the model is loaded, and answers begin.
        deadline = time.monotonic() + 120
        while not (tmp_path / "out").exists() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(3.0)
        started.send_signal(signal.SIGINT)
        out, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130, errors
    assert "Traceback" not in errors
    result = json.loads(out)
    assert result["interrupted"] is True
    assert result["tokens"] < 3 * 400
    assert result["tokens"] == sum(output["tokens"] for output in result["outputs"])
    assert any(output["reason"] == "cancelled" for output in result["outputs"]) or len(result["outputs"]) < 3
    assert (tmp_path / "out" / "timeline.html").exists()


def test_ctrl_c_while_planning_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(LONG)
    started = subprocess.Popen(
        command("plan", "job.yaml", "--save", "plan.yaml"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    try:
        time.sleep(4.0)
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert not (tmp_path / "plan.yaml").exists()


def test_the_same_from_python(
    cache: Path, planned: tuple[Path, Any], ran: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = planned
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    found = stretto.plan(stretto.load(folder / "job.yaml"), on=stretto.probe())
    assert found.best.choices == stretto.load(folder / "plan.yaml").choices
    assert stretto.simulate(found.best).makespan > 0
    result = stretto.run(found.best)
    texts = [output["text"] for output in result.outputs]
    assert texts == [output["text"] for output in ran[1]["outputs"]]
    assert result.measured.source == "measured"
    assert result.measured.overlaps() == []
    assert result.comparison.measured_s == result.measured.makespan
    assert result.files == {}


def test_a_limit_of_seconds_holds_between_arrivals(
    cache: Path, planned: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    plan = stretto.chosen_plan(
        planned[0] / "plan.yaml",
        adjust=lambda job: replace(job, arrival_gap_s=3600.0, limits=replace(job.limits, seconds=2.0)),
    )
    result = stretto.run(plan)
    assert result.interrupted
    assert [output["prompt"] for output in result.outputs] == [plan.job.prompts[0]]
    assert result.comparison.measured_s < 60.0


def test_ranks_do_not_each_plan_for_a_machine_that_is_measured(cache: Path, tmp_path: Path) -> None:
    stretto_json(cache, tmp_path, "probe", "--save", "here.yaml")
    (tmp_path / "job.yaml").write_text("kind: train\nshape: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 48}\n")
    done = ended(cache, tmp_path, "rank", "job.yaml", "--on", "here.yaml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "here.yaml: is this machine, which is measured" in done.stderr
    assert "stretto plan job.yaml --on here.yaml --save plan.yaml" in done.stderr
