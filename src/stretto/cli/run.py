"""`stretto run JOB|PLAN`: plan if need be, run, and lay prediction and reality side by side."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

import stretto
from stretto.cli.app import app, console, print_json, progress_bar, say
from stretto.cli.format import metric
from stretto.cli.plan import prediction_data
from stretto.core.errors import FieldError, UserError
from stretto.core.plan import Context, Prediction, Result
from stretto.files import plan_data


@app.command()
def run(
    what: Path = typer.Argument(metavar="JOB|PLAN", help="A job file (it is planned first) or a plan file."),
    output: Path = typer.Option(Path("reports/run"), "--output", "-o", help="Folder for the report and the event log."),
    recheck: bool = typer.Option(False, "--recheck", help="Accept a plan that was made for another machine."),
    seed: int = typer.Option(0, "--seed", help="Added to the seeds of the job."),
    budget: str | None = typer.Option(None, "--budget", help="Most money of a workflow or a portfolio: 0.30 USD."),
    deadline: str | None = typer.Option(
        None, "--deadline", help="Most time of a workflow or a portfolio: 60 s, 2 min."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print everything as one JSON document."),
) -> None:
    """Run a job here and show predicted beside measured. Ctrl-C ends cleanly with what is done."""
    with progress_bar(quiet=as_json) as progress:
        chosen = stretto.chosen_plan(
            what, recheck=recheck, adjust=lambda job: within(job, budget, deadline), progress=progress
        )
        forecast = stretto.predict(chosen)
        if not as_json:
            show_forecast(chosen.choices, forecast)
    with interruptible() as cancelled, progress_bar(quiet=as_json) as progress:
        ctx = Context(progress=progress, cancelled=cancelled, output=output, seed=seed)
        result = stretto.run(chosen, ctx=ctx)
    if as_json:
        print_json(result_data(result))
    else:
        _show(result)
    if result.interrupted:
        raise typer.Exit(130)


def within(job: Any, budget: str | None, deadline: str | None) -> Any:
    """The job within the limits of the command line.

    Raises:
        UserError: if it is not of a kind that has them.
    """
    if budget is None and deadline is None:
        return job
    if job.kind not in ("workflow", "portfolio"):
        raise UserError(f"a {job.kind} job has neither budget nor deadline", right="leave out --budget and --deadline")
    from stretto.workflow.run import with_limits

    try:
        return with_limits(job, budget, deadline)
    except FieldError as problem:
        raise UserError(str(problem), field=f"--{problem.field}") from None


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag that a run looks at between steps; a second one is Python's own."""
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def show_forecast(choices: Any, forecast: Prediction) -> None:
    say(f"plan: {choices}")
    figures = ", ".join(f"{name.replace('_', ' ')} {metric(value)}" for name, value in forecast.metrics.items())
    say(f"forecast: {figures}")
    say(f"assumed: {forecast.assumed}")


def result_data(result: Result) -> dict[str, Any]:
    """A result as plain values."""
    comparison = result.comparison
    return {
        "predicted_s": comparison.predicted_s,
        "measured_s": comparison.measured_s,
        "error": comparison.error,
        "phases": [
            {
                "phase": row.phase,
                "predicted_s": row.predicted_s,
                "measured_s": row.measured_s,
                "error": row.error if row.measured_s > 0 else None,
                "spans": row.count,
            }
            for row in comparison.phases
        ],
        "forecast": prediction_data(result.forecast),
        "tokens": sum(int(output.get("tokens", 0)) for output in result.outputs),
        "outputs": list(result.outputs),
        "plan": plan_data(result.plan),
        "interrupted": result.interrupted,
        "remarks": list(result.remarks),
        "files": dict(result.files),
    }


def _show(result: Result) -> None:
    for heading, text in result.said:
        if heading:
            console.print(f"[bold]{escape(heading)}[/bold]", highlight=False)
        say(f"  {text}\n" if heading else text)
    table = Table(title="predicted beside measured, with what came out", title_justify="left")
    for heading in ("phase", "spans", "predicted", "measured", "error"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for row in result.comparison.phases:
        table.add_row(
            escape(row.phase),
            str(row.count),
            f"{row.predicted_s:.3f} s",
            f"{row.measured_s:.3f} s",
            f"{row.error:+.1%}",
        )
    total = result.comparison
    table.add_section()
    table.add_row("total", "", f"{total.predicted_s:.3f} s", f"{total.measured_s:.3f} s", f"{total.error:+.1%}")
    console.print(table)
    for remark in result.remarks:
        say(remark)
    if result.interrupted:
        say("interrupted: what stands above was done so far")
    for kind, path in result.files.items():
        say(f"{kind}: {path}")
