"""The workflow domain: jobs from files, plans, forecasts, runs within limits, tools from Python, the log."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto import workflow as wf
from stretto.core.errors import FieldError, UserError
from stretto.core.plan import Context, Plan
from stretto.workflow.job import amount, duration_s
from stretto.workflow.plan import WorkflowPlan, candidates
from stretto.workflow.predict import check, play, predict
from stretto.workflow.steps import bound_of

ROOT = Path(__file__).parents[2]


def wait(name: str, seconds: float, *after: str, **options: Any) -> wf.Step:
    return wf.Step(name=name, tool="wait", args={"seconds": seconds, "result": name}, after=after, **options)


DIAMOND = (wait("a", 0.1), wait("b", 0.2, "a"), wait("c", 0.05, "a"), wait("d", 0.1, "b", "c"))


def run_here(job: wf.WorkflowJob, *, at_once: int = 2, **ctx: Any) -> stretto.Result:
    plan = Plan(kind="workflow", job=job, choices=WorkflowPlan(max_parallel=at_once), cluster=None)
    return wf.domain.run(plan, Context(**ctx))


def test_the_forecast_is_the_run() -> None:
    result = run_here(wf.WorkflowJob(steps=DIAMOND))
    assert result.comparison.predicted_s == pytest.approx(0.4)
    assert abs(result.comparison.error) < 0.1
    assert result.comparison.unmatched_predicted == result.comparison.unmatched_measured == 0
    assert [output["result"] for output in result.outputs] == ["a", "b", "c", "d"]
    assert result.remarks == ("completed: 4 of 4 steps gave a result; spent 0",)


def test_plans_are_widths_and_the_widest_that_helps_is_first() -> None:
    job = wf.WorkflowJob(steps=tuple(wait(f"s{n}", 1.0) for n in range(5)))
    found = list(wf.domain.candidates(job, None))
    assert [plan.max_parallel for plan in found] == [5, 4, 2, 1]
    seconds = [predict(job, plan).metrics["seconds"].value.value for plan in found]
    assert seconds == pytest.approx([1.0, 2.0, 3.0, 5.0])
    assert wf.domain.bound(job, found[0], None) == 1.0
    assert [plan.max_parallel for plan in candidates(1, None)] == [1]
    assert [plan.max_parallel for plan in candidates(8, 3)] == [3]


@pytest.mark.parametrize(
    ("limits", "reason", "nearest"),
    [
        ({"deadline_s": 0.3}, "takes 0.4 s, and the deadline is 0.3 s", "allow 0.4 s"),
        ({"budget": 0.1}, "costs 0.5, and the budget is 0.1", "allow 0.5"),
        ({"max_parallel": 3}, "the job runs 3 steps at once", "run 3"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_beforehand(limits: dict[str, Any], reason: str, nearest: str) -> None:
    job = wf.WorkflowJob(steps=(*DIAMOND, wait("e", 0.0, cost=0.5)), **limits)
    refusal = check(job, WorkflowPlan(max_parallel=2))
    assert refusal is not None
    assert (refusal.reason, refusal.nearest) == (reason, nearest)


def test_a_run_keeps_to_its_deadline_and_its_budget() -> None:
    late = wf.run(wf.WorkflowJob(steps=(wait("a", 0.02), wait("b", 30.0))), deadline="50 ms")
    assert late.ended == "deadline"
    assert late.results["a"] == "a"
    assert late.results["b"].why == "cancelled"
    poor = wf.run(wf.WorkflowJob(steps=(wait("a", 0.0, cost=1.0), wait("b", 0.0, cost=1.0))), budget="1.5 USD")
    assert poor.ended == "failed"
    assert poor.results["b"].why == "no budget"
    assert poor.spent == 1.0


def test_ctrl_c_ends_cleanly_with_what_is_done() -> None:
    start = time.monotonic()
    job = wf.WorkflowJob(steps=(wait("a", 0.0), wait("b", 30.0)))
    result = run_here(job, cancelled=lambda: time.monotonic() - start > 0.1)
    assert result.interrupted
    assert result.outputs[0]["result"] == "a"
    assert result.outputs[1]["failure"] == "cancelled"


def test_results_go_into_arguments_once() -> None:
    steps = (
        wf.Step(name="a", tool="said", args={"text": "{nobody}"}),
        wf.Step(name="b", tool="text", args={"text": "<{a}>"}),
        wf.Step(name="n", tool="count", args={"what": "{b}"}),
        wf.Step(name="c", tool="text", args={"text": "{n}"}),
        wf.Step(name="d", tool="twice", args={"x": "{n}", "more": ["{b}", 1]}),
    )

    @wf.tool
    def said(text: str) -> str:
        """What looks like names."""
        return f"{{b}} {text} {{a}}"

    @wf.tool
    def count(what: str) -> int:
        """Characters."""
        return len(what)

    @wf.tool
    async def twice(x: int, more: list[Any]) -> list[Any]:
        """Double it."""
        return [2 * x, *more]

    outcome = wf.run(wf.WorkflowJob(steps=steps), tools=[said, count, twice])
    assert outcome.results == {
        "a": "{b} {nobody} {a}",
        "b": "<{b} {nobody} {a}>",
        "n": 18,
        "c": outcome.results["c"],
        "d": [36, "<{b} {nobody} {a}>", 1],
    }
    assert "text is 18; it must be str" in str(outcome.results["c"])


@pytest.mark.parametrize("used", ["b", "a"])
def test_results_of_steps_below_are_refused(used: str) -> None:
    steps = (wf.Step(name="a", tool="text", args={"text": f"<{{{used}}}>"}), wf.Step(name="b", tool="wait"))
    with pytest.raises(FieldError, match=r"steps\.0\.args is '\{[ab]\}'; it must be of a step above"):
        wf.WorkflowJob(steps=steps)


@pytest.mark.parametrize(("text", "money"), [("0.30", 0.3), ("0.30 USD", 0.3), ("1e-2EUR", 0.01)])
def test_money_is_a_number_with_a_currency_or_without(text: str, money: float) -> None:
    assert amount(text) == money
    with pytest.raises(FieldError, match="the code of its currency"):
        amount("30 cents")


def test_a_file_cannot_bring_tools() -> None:
    job = wf.WorkflowJob(steps=(wf.Step(name="x", tool="os.system", args={"command": "id"}),))
    said = (
        r"step x calls os.system, and there is no such tool; use one of wait, text, ask; tools of one's own are passed"
    )
    with pytest.raises(UserError, match=said):
        wf.run(job)
    refusal = check(job, WorkflowPlan(max_parallel=1))
    assert refusal is not None
    assert "no such tool" in refusal.reason


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"tool": "ask", "args": {"prompt": "?"}}, "gives ask prompt; give it source and prompt"),
        (
            {"tool": "ask", "args": {"prompt": "?", "source": "x"}},
            "asks 'x', and there is no such source; there is none",
        ),
        ({"tool": "wait", "args": {}}, "wait needs seconds; call it as wait"),
        ({"tool": "wait", "args": {"seconds": 1, "colour": 2}}, "wait has no parameter colour"),
    ],
)
def test_calls_that_cannot_be_made_are_told_before_anything_runs(step: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        wf.run(wf.WorkflowJob(steps=(wait("first", 0.0), wf.Step(name="s", **step))))


def test_sources_are_scripts_or_endpoints_and_their_tokens_are_paid() -> None:
    script = "forty characters or so, ten tokens long."
    source = wf.Source(script=script, first_token_s=0.01, token_s=0.001, output_price=1e6)
    step = wf.Step(name="q", tool="ask", args={"source": "s", "prompt": "?"})
    job = wf.WorkflowJob(steps=(step,), sources={"s": source}, budget=300.0)
    outcome = wf.run(job)
    assert outcome.results["q"] == script
    assert outcome.usage["q"].completion_tokens == 11
    assert outcome.spent == 11.0
    assert play(job, 1).spent == 11.0


def test_a_run_that_was_killed_goes_on_from_its_log(tmp_path: Path) -> None:
    made: list[str] = []

    @wf.tool
    async def note(text: str) -> str:
        """Note it."""
        made.append(text)
        if text == "b" and len(made) == 2:
            raise KeyboardInterrupt
        return text

    steps = tuple(
        wf.Step(name=name, tool="note", args={"text": name}, after=after) for name, after in (("a", ()), ("b", ("a",)))
    )
    job = wf.WorkflowJob(steps=steps, log=str(tmp_path / "log"))
    with pytest.raises(KeyboardInterrupt):
        wf.run(job, tools=[note])
    assert wf.run(job, tools=[note]).results == {"a": "a", "b": "b"}
    assert made == ["a", "b", "b"]
    with pytest.raises(UserError, match="the log is of"):
        wf.run(wf.WorkflowJob(steps=steps[:1], log=job.log), tools=[note])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("after: [later]", r"job.yaml:3: steps.0.after: the value is 'later'; it must be the name of a step above"),
        ("name: 1 a", r"steps.0.name: the value is '1 a'; it must be a name of letters"),
        ("attempts: 0", r"steps.0.attempts: the value is 0; it must be in 1 .. 1000"),
        ("run: rm", r"steps.0.run: there is no such field"),
    ],
)
def test_mistakes_in_a_file_are_told_by_line(tmp_path: Path, change: str, said: str) -> None:
    lines = {"name": "name: a", "tool": "tool: text"}
    lines[change.partition(":")[0]] = change
    text = "kind: workflow\nsteps:\n  - " + "\n    ".join(lines.values()) + "\n"
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError, match=said.replace("job.yaml:3", r"job.yaml:\d")):
        stretto.load(tmp_path / "job.yaml")


def test_quantities() -> None:
    assert [amount("0.30 USD"), amount(2), amount("1e-3")] == [0.3, 2.0, 0.001]
    assert [duration_s("60"), duration_s("2 min"), duration_s("50ms"), duration_s(1.5)] == [60.0, 120.0, 0.05, 1.5]
    for wrong in ("", "soon", "-1 s", "3 days", "0 s"):
        with pytest.raises(FieldError, match="deadline"):
            duration_s(wrong)
    with pytest.raises(FieldError, match="budget"):
        amount("USD")


def stretto_says(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stretto", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_the_command_runs_a_job_within_limits(tmp_path: Path) -> None:
    limits = ("--budget", "0.02 USD", "--deadline", "20 s")
    done = stretto_says("run", "jobs/workflow.yaml", "-o", str(tmp_path), "--json", *limits)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [output["step"] for output in said["outputs"]] == ["kenya", "blanc", "facts", "answer"]
    assert said["outputs"][3]["tokens"] > 0
    assert "within a budget of 0.02 and a deadline of 20 s" in said["remarks"][0]
    assert (tmp_path / "timeline.html").exists()
    for wrong, text in (
        (("--deadline", "1 s"), "takes 1.14 s, and the deadline is 1 s; allow 1.14 s"),
        (("--budget", "lots"), "--budget: budget is 'lots'; it must be a number"),
    ):
        refused = stretto_says("run", "jobs/workflow.yaml", "-o", str(tmp_path), *wrong)
        assert refused.returncode == 2
        assert text in refused.stderr
    other = stretto_says("run", "jobs/quickstart.yaml", "--budget", "1")
    assert "a serve job has neither budget nor deadline" in other.stderr


def most_at_once(step: str, tool: str, **limits: Any) -> int:
    """How many of five calls run at once; one step has the name `step`."""
    now, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.05)
        with lock:
            now -= 1

    tools = [wf.tool(name=tool, **{k: v for k, v in limits.items() if k == "limit"})(work)]
    names = [step, *(f"s{n}" for n in range(4))]
    job = wf.WorkflowJob(
        steps=tuple(wf.Step(name=name, tool=tool) for name in names), max_parallel=limits.get("max_parallel")
    )
    outcome = wf.run(job, tools=tools)
    assert outcome.ended == "completed"
    return most


@pytest.mark.parametrize(
    ("step", "tool", "limits", "most"),
    [
        ("a", "work", {}, 5),
        ("steps", "work", {"max_parallel": 1}, 1),
        ("tools", "tools", {"max_parallel": 1}, 1),
        ("a", "work", {"limit": 2}, 2),
        ("work", "work", {"limit": 2, "max_parallel": 4}, 2),
    ],
)
def test_limits_hold_whatever_steps_and_tools_are_called(
    step: str, tool: str, limits: dict[str, Any], most: int
) -> None:
    assert most_at_once(step, tool, **limits) == most


def test_a_step_takes_its_tools_terms_where_it_has_none() -> None:
    @wf.tool(on_error="feed")
    def told(given: str) -> str:
        return str(given)

    @wf.tool
    def broken() -> str:
        raise ValueError("broken")

    steps = (wf.Step(name="a", tool="broken"), wf.Step(name="b", tool="told", args={"given": "got {a}"}))
    outcome = wf.run(wf.WorkflowJob(steps=steps), tools=[told, broken])
    assert outcome.results["b"] == "got raised: ValueError: broken"


def test_what_is_charged_beyond_bounds_is_told() -> None:
    @wf.tool(price=0.01)
    def dear() -> wf.Paid:
        return wf.Paid("x", 0.5)

    outcome = wf.run(wf.WorkflowJob(steps=(wf.Step(name="a", tool="dear"),), budget=0.1), tools=[dear])
    assert (outcome.spent, outcome.overrun) == pytest.approx((0.01, 0.49))


def test_a_prompt_is_bounded_by_its_bytes() -> None:
    source = wf.Source(script="x", input_price=1.0, max_tokens=1)
    plain, wide = (
        bound_of(wf.WorkflowJob(steps=(step,), sources={"s": source}), step, {})
        for text in ("a" * 1000, "漢" * 1000)
        for step in [wf.Step(name="a", tool="ask", args={"source": "s", "prompt": text})]
    )
    assert wide - plain == pytest.approx(2000e-6)


def test_texts_do_not_grow_without_end() -> None:
    steps = [wf.Step(name="s0", tool="text", args={"text": "x" * 1000})]
    steps += [wf.Step(name=f"s{n}", tool="text", args={"text": f"{{s{n - 1}}}-{{s{n - 1}}}"}) for n in range(1, 24)]
    began = time.monotonic()
    outcome = wf.run(wf.WorkflowJob(steps=tuple(steps)))
    assert outcome.ended == "failed"
    failed = [result for result in outcome.results.values() if isinstance(result, wf.Failure)]
    assert "an argument has more than 4194304 characters" in str(failed[0])
    assert time.monotonic() - began < 10
