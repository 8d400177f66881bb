"""`stretto plan JOB`: weigh the ways to run a job."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import stretto
from stretto.cli.app import app, console, print_json, progress_bar, say
from stretto.cli.format import cell, interval
from stretto.core.errors import UserError
from stretto.core.plan import Prediction
from stretto.core.search import Ranking
from stretto.files import check_place, load_cluster, load_job, save_plan
from stretto.hardware.what_if import changed
from stretto.serve.deploy.asking import adjusted, fewest_devices
from stretto.serve.deploy.emit import commands


@app.command()
def plan(
    job: Path = typer.Argument(help="A job file."),
    on: Path | None = typer.Option(None, "--on", help="A cluster file; this machine if left out."),
    top: int = typer.Option(5, "--top", min=1, help="How many plans to show."),
    save: Path | None = typer.Option(None, "--save", help="Write the best plan here."),
    objective: str | None = typer.Option(None, "--objective", help="Rank by this instead of the job's own."),
    trace: Path | None = typer.Option(None, "--trace", help="Requests of a deployment, in place of the job's load."),
    what_if: str | None = typer.Option(None, "--what-if", help="Other machines: link=2x,memory=+16GB."),
    fewest: bool = typer.Option(False, "--fewest", help="Find the fewest devices that keep a deployment's promise."),
    emit: str | None = typer.Option(None, "--emit", help="Print the best plan's command: vllm, sglang or llama.cpp."),
    budget: float | None = typer.Option(None, "--budget", min=0.0, help="Seconds for the search; the best so far."),
    workers: int = typer.Option(1, "--workers", min=1, max=256, help="Processes that simulate plans."),
    as_json: bool = typer.Option(False, "--json", help="Print the ranking as JSON."),
) -> None:
    """Rank the ways to run JOB, with a reason for each that cannot run."""
    if save is not None:
        check_place(save)
    asked = adjusted(load_job(job), trace=None if trace is None else str(trace), objective=objective)
    if (emit is not None or fewest) and asked.kind != "deployment":
        raise UserError(f"the job's kind is {asked.kind}", right="--emit and --fewest are for kind deployment")
    with progress_bar(quiet=as_json) as progress, _executor(workers) as executor:
        machines = stretto.probe(progress=progress) if on is None else load_cluster(on)
        machines = machines if what_if is None else changed(machines, what_if)

        def rank(one: Any) -> Ranking:
            return stretto.plan(one, on=machines, executor=executor, progress=progress, budget_s=budget)

        count, ranking = fewest_devices(asked, machines, rank) if fewest else (None, rank(asked))
    if save is not None:
        save_plan(ranking.best, save)
    lines = [] if emit is None else commands(emit, ranking.best.job, ranking.best.choices, machines)
    if as_json:
        print_json(as_data(ranking, top) | ({"commands": lines} if lines else {}))
        return
    show(ranking, top)
    if count is not None:
        say(f"fewest devices that keep the promise: {count}")
    for line in lines:
        say(line, soft_wrap=True)
    if save is not None:
        say(f"plan written to {save}")


@contextmanager
def _executor(workers: int) -> Iterator[Executor | None]:
    """Processes for the search's simulations; none of them for one worker."""
    if workers == 1:
        yield None
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        yield executor


_PERCENTILE = re.compile(r"_p\d+$")


def _choices(choices: Any) -> dict[str, Any]:
    return dataclasses.asdict(choices)


def prediction_data(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain values."""
    metrics = {
        name: {"value": m.value.value, "low": m.value.low, "high": m.value.high, "unit": m.unit}
        for name, m in prediction.metrics.items()
    }
    table = {"table": prediction.table.splitlines()} if prediction.table else {}
    return {"metrics": metrics, "bottleneck": prediction.bottleneck, "assumed": prediction.assumed} | table


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
        "untried": ranking.untried,
        "pruned": [{"choices": _choices(p.choices), "bound": p.bound} for p in ranking.pruned],
    }


def show(ranking: Ranking, top: int) -> None:
    """Print a ranking for people: the best plans, why the first won, and the reasons of the refused."""
    shown = ranking.weighed[:top]
    rows = [_choices(weighed.plan.choices) for weighed in shown]
    differing = [name for name in rows[0] if any(row[name] != rows[0][name] for row in rows)]
    names = [name for name in shown[0].prediction.metrics if not _PERCENTILE.search(name)]
    table = Table(title="plans, best first", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ["", *differing, *(name.replace("_", " ") for name in names)]:
        table.add_column(heading)
    for number, (weighed, row) in enumerate(zip(shown, rows, strict=True), start=1):
        figures = (cell(weighed.prediction.metrics[name]) for name in names)
        table.add_row(str(number), *(str(row[name]) for name in differing), *figures)
    console.print(table)
    common = ", ".join(f"{name} {value}" for name, value in rows[0].items() if name not in differing)
    say(f"all of these: {common}")
    for number, weighed in enumerate(shown[1:], start=2):
        say(f"  {number} beside 1: {ranking.behind(weighed)}")
    _show_percentiles(shown[0].prediction)
    untried = f", {ranking.untried} not tried for want of time" if ranking.untried else ""
    console.print(
        f"{len(ranking.weighed)} simulated, {len(ranking.pruned)} pruned, {len(ranking.rejected)} rejected{untried}"
    )
    by_reason: dict[str, list[Any]] = {}
    for rejected in ranking.rejected:
        by_reason.setdefault(str(rejected.refusal), []).append(rejected.choices)
    for reason, group in by_reason.items():
        say(f"  rejected ({len(group)}): {reason}")
    say(f"why: {ranking.why}")
    best = ranking.weighed[0].prediction
    if best.assumed:
        say(f"assumed: {best.assumed}")
    if best.table:
        say(best.table)


def _show_percentiles(prediction: Prediction) -> None:
    """The best plan's percentiles, a line for each figure that has them."""
    for name in prediction.metrics:
        points = {key: m for key, m in prediction.metrics.items() if key.startswith(f"{name}_p")}
        if points:
            shown = (f"{key.removeprefix(name + '_')} {interval(m.value, m.unit)}" for key, m in points.items())
            say(f"  {name.replace('_', ' ')} of 1: {', '.join(shown)}")
