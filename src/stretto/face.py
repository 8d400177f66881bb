"""The public face: the three verbs and what belongs to them, over whichever domain a job names."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from stretto import files
from stretto.core.errors import UserError
from stretto.core.plan import Context, Plan, Prediction, Progress, Result, domain_of, no_progress
from stretto.core.search import Ranking, search
from stretto.core.trace import Comparison, Trace
from stretto.hardware.cluster import Cluster
from stretto.hardware.probe import probe as measure


def probe(*, again: bool = False, progress: Progress | None = None) -> Cluster:
    """This machine as a cluster; measured once and cached, measured anew with `again`."""
    return measure(again=again, progress=progress)


def _machines(on: Cluster | str | Path | None, progress: Progress) -> Cluster:
    if isinstance(on, Cluster):
        return on
    return probe(progress=progress) if on is None else files.load_cluster(on)


def plan(
    job: Any,
    *,
    on: Cluster | str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress = no_progress,
    budget_s: float | None = None,
) -> Ranking:
    """Rank the ways to run `job`.

    Args:
        on: a cluster, a cluster file, or None for this machine.
        executor: where simulations run; None runs them here.
        budget_s: seconds after which the best plan so far is the answer.

    Raises:
        UserError: if nothing can run, or the machines lack what a prediction needs.
    """
    domain = domain_of(job.kind)
    cluster = domain.prepare(job, _machines(on, progress), progress)
    return search(domain, job, cluster, executor=executor, progress=progress, budget_s=budget_s)


def predict(chosen: Plan[Any, Any]) -> Prediction:
    """What would happen if `chosen` ran: metrics with intervals, and the simulated trace."""
    return domain_of(chosen.kind).simulate(chosen.job, chosen.choices, chosen.cluster)


def simulate(chosen: Plan[Any, Any]) -> Trace:
    """The trace of `chosen` on a virtual clock."""
    trace = predict(chosen).trace
    assert trace is not None
    return trace


def run(chosen: Plan[Any, Any], *, ctx: Context | None = None) -> Result:
    """Carry out `chosen` on this machine; with `ctx.output` a report is written there."""
    context = ctx or Context()
    if context.output is not None:
        _make_folder(context.output)
    result = domain_of(chosen.kind).run(chosen, context)
    if context.output is None:
        return result
    notes = [f"plan: {chosen.choices}", f"forecast assumed: {result.forecast.assumed}", *result.remarks]
    written = write_report(
        [result.predicted, result.measured],
        context.output,
        title="stretto run: predicted above, measured below",
        comparison=result.comparison,
        notes=notes,
    )
    return replace(result, files={**result.files, **written})


def chosen_plan(
    path: str | Path,
    *,
    on: Cluster | str | Path | None = None,
    recheck: bool = False,
    adjust: Callable[[Any], Any] = lambda job: job,
    progress: Progress = no_progress,
) -> Plan[Any, Any]:
    """The plan that a file asks for: a plan file's own, or the best one for a job file; `adjust` may change the job.

    Raises:
        UserError: if a plan was made for other machines (unless `recheck`) or cannot run on these.
    """
    loaded = files.load(path)
    if not isinstance(loaded, Plan):
        return plan(adjust(loaded), on=on, progress=progress).best
    loaded = replace(loaded, job=adjust(loaded.job))
    machines = _machines(on, progress)
    files.check_fingerprint(loaded, machines, recheck=recheck, file=str(path))
    loaded = files.bind(loaded, machines, file=str(path))  # before anything is measured, which takes long
    prepared = domain_of(loaded.kind).prepare(loaded.job, machines, progress)
    return files.bind(loaded, prepared, file=str(path))


def _make_folder(folder: Path) -> None:
    """Make it, and see that files can be written there: a run's results must not be lost at its end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as problem:
        raise UserError(
            f"the folder cannot be made or written: {problem.strerror}",
            file=str(folder),
            right="name one that may be written",
        ) from None


def write_report(
    traces: Sequence[Trace],
    folder: str | Path,
    *,
    title: str,
    comparison: Comparison | None = None,
    notes: Sequence[str] = (),
) -> dict[str, str]:
    """Write the HTML page, a Perfetto file for each trace and, where matplotlib is installed, a PNG; returns
    their paths.
    """
    from stretto.report import curves, page, png

    target = Path(folder)
    _make_folder(target)
    written = {"html": target / "timeline.html"}
    files.write_text(written["html"], page(traces, title=title, comparison=comparison, notes=notes))
    for trace in traces:
        name = f"perfetto_{trace.source}"
        written[name] = target / f"{trace.source}.perfetto.json"
        files.write_text(written[name], json.dumps(trace.to_chrome()))
    try:
        png(traces, target / "timeline.png", title=title)
        written["png"] = target / "timeline.png"
        if any(trace.attributes.get("curves") for trace in traces):
            curves(traces, target / "curves.png", title=title)
            written["curves"] = target / "curves.png"
    except UserError:
        pass
    return {name: str(path) for name, path in written.items()}
