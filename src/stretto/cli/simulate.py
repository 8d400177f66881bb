"""`stretto simulate JOB|PLAN`: play a plan on a virtual clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

import stretto
from stretto.cli.app import app, console, print_json, progress_bar, say
from stretto.cli.format import metric, quantity
from stretto.cli.plan import prediction_data
from stretto.core.plan import Prediction
from stretto.core.trace import Trace


@app.command()
def simulate(
    what: Path = typer.Argument(metavar="JOB|PLAN", help="A job file (its best plan is taken) or a plan file."),
    on: Path | None = typer.Option(None, "--on", help="A cluster file; this machine if left out."),
    output: Path = typer.Option(Path("reports/simulate"), "--output", "-o", help="Folder for the pictures."),
    recheck: bool = typer.Option(False, "--recheck", help="Accept a plan that was made for other machines."),
    as_json: bool = typer.Option(False, "--json", help="Print the metrics as JSON."),
) -> None:
    """Show what would happen: metrics, a timeline page, a Perfetto file, a picture."""
    with progress_bar(quiet=as_json) as progress:
        chosen = stretto.chosen_plan(what, on=on, recheck=recheck, progress=progress)
        prediction = stretto.predict(chosen)
    trace = prediction.trace
    assert trace is not None
    files = stretto.write_report([trace], output, title=f"stretto simulate {what.name}", notes=[prediction.assumed])
    if as_json:
        print_json({**prediction_data(prediction), "trace": trace_data(trace), "files": files})
    else:
        _show(prediction, trace)
        for kind, path in files.items():
            say(f"{kind}: {path}")


def trace_data(trace: Trace) -> dict[str, Any]:
    """The metrics of a trace as plain values."""
    return {
        "makespan_s": trace.makespan,
        "busy_s": trace.busy,
        "bubble": trace.bubble,
        "phase_s": trace.phase_seconds,
        "critical_s": trace.critical_seconds,
        "peak_memory_bytes": trace.peak_memory,
        "spans": len(trace),
    }


def _show(prediction: Prediction, trace: Trace) -> None:
    for name, value in prediction.metrics.items():
        say(f"{name.replace('_', ' ')}: {metric(value)}")
    table = Table(title="lanes", title_justify="left")
    for heading in ("lane", "busy", "bubble"):
        table.add_column(heading)
    for lane, seconds in trace.busy.items():
        table.add_row(lane, quantity(seconds, "s"), f"{trace.bubble[lane]:.1%}")
    console.print(table)
    say(f"bottleneck: {prediction.bottleneck}")
    say(f"assumed: {prediction.assumed}")
