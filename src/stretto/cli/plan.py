"""`stretto plan JOB`: weigh the ways to run a job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import stretto
from stretto.cli.app import app, console, print_json, progress_bar
from stretto.cli.format import cell
from stretto.core.plan import Prediction
from stretto.core.search import Ranking
from stretto.files import load_job, save_plan


@app.command()
def plan(
    job: Path = typer.Argument(help="A job file."),
    on: Path | None = typer.Option(None, "--on", help="A cluster file; this machine if left out."),
    top: int = typer.Option(5, "--top", min=1, help="How many plans to show."),
    save: Path | None = typer.Option(None, "--save", help="Write the best plan here."),
    as_json: bool = typer.Option(False, "--json", help="Print the ranking as JSON."),
) -> None:
    """Rank the ways to run JOB, with a reason for each that cannot run."""
    with progress_bar(quiet=as_json) as progress:
        ranking = stretto.plan(load_job(job), on=on, progress=progress)
    if save is not None:
        save_plan(ranking.best, save)
    if as_json:
        print_json(as_data(ranking, top))
    else:
        show(ranking, top)
        if save is not None:
            console.print(f"plan written to {save}")


def _choices(choices: Any) -> dict[str, Any]:
    return dataclasses.asdict(choices)


def prediction_data(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain values."""
    metrics = {
        name: {"value": m.value.value, "low": m.value.low, "high": m.value.high, "unit": m.unit}
        for name, m in prediction.metrics.items()
    }
    return {"metrics": metrics, "bottleneck": prediction.bottleneck, "assumed": prediction.assumed}


def as_data(ranking: Ranking, top: int) -> dict[str, Any]:
    """A ranking as plain values."""
    return {
        "objective": ranking.objective,
        "why": ranking.why,
        "plans": [
            {
                "choices": _choices(w.plan.choices),
                "beside_the_first": ranking.behind(w),
                **prediction_data(w.prediction),
            }
            for w in ranking.weighed[:top]
        ],
        "rejected": [
            {"choices": _choices(r.choices), "reason": r.refusal.reason, "nearest": r.refusal.nearest}
            for r in ranking.rejected
        ],
        "pruned": [{"choices": _choices(p.choices), "bound": p.bound} for p in ranking.pruned],
    }


def show(ranking: Ranking, top: int) -> None:
    """Print a ranking for people: the best plans, why the first won, and the reasons of the refused."""
    shown = ranking.weighed[:top]
    rows = [_choices(weighed.plan.choices) for weighed in shown]
    differing = [name for name in rows[0] if any(row[name] != rows[0][name] for row in rows)]
    names = list(shown[0].prediction.metrics)
    table = Table(title="plans, best first", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ["", *differing, *(name.replace("_", " ") for name in names)]:
        table.add_column(heading)
    for number, (weighed, row) in enumerate(zip(shown, rows, strict=True), start=1):
        figures = (cell(weighed.prediction.metrics[name]) for name in names)
        table.add_row(str(number), *(str(row[name]) for name in differing), *figures)
    console.print(table)
    common = ", ".join(f"{name} {value}" for name, value in rows[0].items() if name not in differing)
    console.print(f"all of these: {common}", highlight=False)
    for number, weighed in enumerate(shown[1:], start=2):
        console.print(f"  {number} beside 1: {ranking.behind(weighed)}", highlight=False)
    console.print(f"{len(ranking.weighed)} simulated, {len(ranking.pruned)} pruned, {len(ranking.rejected)} rejected")
    by_reason: dict[str, list[Any]] = {}
    for rejected in ranking.rejected:
        by_reason.setdefault(str(rejected.refusal), []).append(rejected.choices)
    for reason, group in by_reason.items():
        console.print(f"  rejected ({len(group)}): {reason}", highlight=False)
    console.print(f"why: {ranking.why}", highlight=False)
    if ranking.weighed[0].prediction.assumed:
        console.print(f"assumed: {ranking.weighed[0].prediction.assumed}", highlight=False)
