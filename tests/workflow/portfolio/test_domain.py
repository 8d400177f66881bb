"""The portfolio domain: files, refusals, predictions, a run on the real clock; and the page about it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto import workflow as wf
from stretto.core.errors import FieldError, UserError
from stretto.workflow import portfolio as pf
from stretto.workflow.portfolio.domain import domain
from stretto.workflow.portfolio.job import PortfolioJob, PortfolioPlan, Step, Try
from tests.test_examples import ROOT, blocks

CLUSTER = ROOT / "clusters" / "8xa100.yaml"
QUICK = {"success": 0.7, "latency_s": 0.02, "latency_std_s": 0.01, "tokens": 1000}
FILE: dict[str, Any] = {
    "kind": "portfolio",
    "budget": 0.02,
    "deadline_s": 2.0,
    "trials": 20,
    "levels": [1, 4],
    "prices": {"m": 1.0},
    "steps": [{"name": "a", "models": {"m": QUICK}}, {"name": "b", "after": ["a"], "models": {"m": QUICK}}],
}


def job(**fields: Any) -> PortfolioJob:
    tried = Try(**QUICK)
    steps = (Step(name="a", models={"m": tried}), Step(name="b", models={"m": tried}, after=("a",)))
    options = {"steps": steps, "prices": {"m": 1.0}, "budget": 0.02, "deadline_s": 2.0, "trials": 20, "levels": (1, 4)}
    return PortfolioJob(**{**options, **fields})


def written(tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({**FILE, **fields}), encoding="utf-8")
    return path


def test_a_file_is_a_job(tmp_path: Path) -> None:
    assert stretto.load(written(tmp_path)) == job()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"budget": -1.0}, ["budget", "-1.0"]),
        ({"deadline_s": "soon"}, ["deadline_s", "soon"]),
        ({"prices": {}}, ["prices", "given for m too"]),
        ({"levels": [4, 1]}, ["levels", "ascending"]),
        ({"steps": []}, ["nodes", "1 to 64"]),
        ({"steps": [{"name": "a", "after": ["a"], "models": {"m": QUICK}}]}, ["a -> a", "free of cycles"]),
        (
            {"steps": [{"name": "a", "after": ["x"], "models": {"m": QUICK}}]},
            ["steps.0.after", "'x'", "name of a step"],
        ),
        ({"steps": [{"name": "a", "models": {}}]}, ["steps.0.models", "at least one model"]),
        ({"steps": [{"name": "a", "models": {"m": {**QUICK, "success": 2.0}}}]}, ["steps.0.models.m.success", "2.0"]),
        ({"steps": [{"name": "a", "models": {"m": {**QUICK, "tokens": -5}}}]}, ["steps.0.models.m.tokens", "-5"]),
        ({"steps": [{"name": "a", "models": {"m": {**QUICK, "speed": 1}}}]}, ["speed"]),
        ({"run": "rm -rf"}, ["run", "no such field"]),
    ],
)
def test_a_mistake_in_a_file_is_one_clear_line(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        stretto.load(written(tmp_path, **fields))
    assert [word for word in [*words, "job.yaml"] if word not in str(caught.value)] == []


def test_plans_are_ranked_by_completion_and_the_impossible_refused() -> None:
    ranking = stretto.plan(job(budget=0.0075), on=CLUSTER)
    assert ranking.objective == "completion"
    assert ranking.best.choices == PortfolioPlan()
    (refused,) = ranking.rejected
    assert refused.choices == PortfolioPlan(policy="seq", model="m", count=4)
    assert "4 samples of each step may cost 0.008 USD" in refused.refusal.reason
    trace = stretto.simulate(ranking.best)
    assert trace.overlaps() == []
    assert 0 < trace.makespan <= 2.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"budget": 0.001}, "one sample of each step may cost 0.002 USD"), ({"deadline_s": 0.001}, "longest path takes")],
)
def test_a_job_that_no_plan_can_meet_is_told_why(fields: dict[str, Any], words: str) -> None:
    refusal = domain.check(job(**fields), PortfolioPlan(), None)  # type: ignore[arg-type]
    assert refusal is not None
    assert words in str(refusal)


def test_a_plan_for_an_unknown_model_is_refused() -> None:
    refusal = domain.check(job(), PortfolioPlan(policy="seq", model="x", count=1), None)  # type: ignore[arg-type]
    assert str(refusal) == "no step may be tried on x; model: m"


@pytest.mark.parametrize("fields", [{"policy": "seq"}, {"model": "m"}, {"policy": "seq", "model": "m"}, {"count": 2}])
def test_bad_plans_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=r"model|count"):
        PortfolioPlan(**fields)


def test_a_run_is_rehearsed_on_the_real_clock_beside_its_prediction(tmp_path: Path) -> None:
    best = stretto.plan(job(), on=CLUSTER).best
    result = stretto.run(best, ctx=stretto.Context(output=tmp_path, seed=3))
    assert {sample["step"] for sample in result.outputs if sample["success"]} == {"a", "b"}
    assert result.measured.makespan >= result.predicted.makespan > 0
    assert (result.comparison.unmatched_predicted, result.comparison.unmatched_measured) == (0, 0)
    assert "USD" in result.said[0][1]
    assert (tmp_path / "timeline.html").exists()


def test_a_run_that_is_stopped_ends_at_once_with_what_is_done(tmp_path: Path) -> None:
    slow = Try(**{**QUICK, "latency_s": 20.0, "latency_std_s": 0.1, "success": 1.0})
    steps = (Step(name="a", models={"m": Try(**{**QUICK, "success": 1.0})}), Step(name="b", models={"m": slow}))
    best = stretto.plan(job(steps=steps, deadline_s=60.0), on=CLUSTER).best
    start = time.monotonic()
    stop_at = start + 1.0
    result = stretto.run(best, ctx=stretto.Context(output=tmp_path, cancelled=lambda: time.monotonic() > stop_at))
    assert time.monotonic() - start < 10.0
    assert result.interrupted
    assert "cancelled after" in result.said[0][1]
    how = {sample["step"]: sample["how"] for sample in result.outputs}
    assert how == {"a": "returned", "b": "cancelled"}
    assert (tmp_path / "timeline.html").exists()


def test_the_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "portfolio_page"}
    for text in blocks(ROOT / "docs" / "portfolio.md", "python"):
        exec(compile(text, "portfolio.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "Launch(node='draft'" in printed
    assert "budget" in printed
    assert "completed" in printed


def test_a_job_is_run_from_python_with_attempts_of_ones_own() -> None:
    asked = list[tuple[str, str]]()

    async def attempt(node: str, model: str, seed: int) -> pf.Outcome:
        asked.append((node, model))
        return pf.Outcome(success=True, cost=0.001, output=f"{node} done")

    asked_for = wf.load(ROOT / "jobs" / "codeflow.yaml")
    found = wf.run(asked_for, attempt=attempt, budget="0.30 USD", deadline="60 s")
    assert found.end == "completed"
    assert found.outputs == {step.name: f"{step.name} done" for step in asked_for.steps}
    assert found.spent == pytest.approx(0.001 * len(asked))
    assert found.spent <= 0.30
    assert wf.run(asked_for, attempt=attempt, budget=0.0).end == "budget_exhausted"
    with pytest.raises(AttributeError, match="lode"):
        wf.lode  # noqa: B018
