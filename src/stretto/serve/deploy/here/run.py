"""Carrying a deployment out on this machine, and laying the prediction beside what happened."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from stretto.core.eventlog import EventLog
from stretto.core.plan import Context, Plan, Prediction, Result
from stretto.core.record import Recorder
from stretto.models.calibrate import TOLERANCE
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.here import choices
from stretto.serve.deploy.here.running import started
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.plan import DeploymentPlan
from stretto.serve.deploy.report import Latencies
from stretto.serve.deploy.simulate import Served, serve

EVENT_LOG = "events"


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a real run gave: the part of the load that was served, how, and the machine's pace before and after."""

    load: Load
    served: Served
    recorder: Recorder
    logs: tuple[EventLog, ...]
    paces: tuple[float, float]

    @property
    def pace(self) -> float:
        return sum(self.paces) / 2


def run(plan: Plan[DeploymentJob, DeploymentPlan], forecast: Prediction, ctx: Context) -> Result:
    """Serve the job's load on worker processes, and simulate it once more at the pace that the machine had.

    With `ctx.output`, each copy's event log is written there.

    Raises:
        UserError: if the workers do not get ready, or the run was cancelled before a request was served.
    """
    job, choice = plan.job, plan.choices
    costs = choices.costs_of(job, choice, plan.cluster)
    config = choices.scheduler_config(job, choice, plan.cluster)
    played = asyncio.run(_play(plan, ctx))
    recorder = Recorder("simulated")
    said = serve(played.load, costs.at_pace(played.pace), config, recorder=recorder)
    predicted, measured = recorder.trace(), played.recorder.trace()
    files = {}
    if ctx.output is not None:
        for number, log in enumerate(played.logs):
            name = EVENT_LOG if choice.replicas == 1 else f"{EVENT_LOG}-{number}"
            log.save(ctx.output / f"{name}.jsonl")
            files[name] = str(ctx.output / f"{name}.jsonl")
    return Result(
        plan=plan,
        outputs=tuple(_outputs(played.load, played.served)),
        said=tuple(("", line) for line in figures(played.load, said, played.served)),
        measured=measured,
        predicted=predicted,
        forecast=forecast,
        comparison=predicted.compare(measured),
        interrupted=len(played.load) < len(load_of(job.load)),
        remarks=_remarks(*played.paces),
        files=files,
    )


async def _play(plan: Plan[DeploymentJob, DeploymentPlan], ctx: Context) -> Played:
    job, choice, cluster = plan.job, plan.choices, plan.cluster
    load, costs = load_of(job.load), choices.costs_of(job, choice, cluster)
    config = choices.scheduler_config(job, choice, cluster)
    trial = choices.points_of(job, choice, cluster).trial(choice.replicas)
    recorder = Recorder("measured")
    logs = tuple(EventLog(header=dataclasses.asdict(config)) for _ in range(choice.replicas))
    ctx.progress("starting workers", 0, 0)
    path, dtype = choices.path_of(job.model, choice.devices), choices.dtype_of(cluster)
    async with started(job.model, choice.layout, config, dtype=dtype, path=path) as here:
        before = await here.pace(costs, trial)
        part, served = await here.serve(
            load,
            recorder=recorder,
            logs=logs,
            told=lambda finished: ctx.progress("requests", finished, len(load)),
            cancelled=ctx.cancelled,
        )
        after = before if len(part) < len(load) else await here.pace(costs, trial)
    recorder.memory("this machine", 0.0, choices.memory_bytes(job, choice, cluster))
    return Played(load=part, served=served, recorder=recorder, logs=logs, paces=(before, after))


def figures(load: Load, said: Served, real: Served) -> list[str]:
    """Lines of a table: what a deployment is judged by, predicted beside measured."""
    rows = list(zip(_figures(load, said), _figures(load, real), strict=True))
    lines = [f"{'':24}{'predicted':>16}{'measured':>16}{'error':>9}"]
    for (name, unit, a), (_, _, b) in rows:
        shown = (f"{a * 1e3:.1f} ms", f"{b * 1e3:.1f} ms") if unit == "s" else (f"{a:.4g} {unit}", f"{b:.4g} {unit}")
        error = f"{a / b - 1:+.1%}" if b else ""
        lines.append(f"{name:24}{shown[0]:>16}{shown[1]:>16}{error:>9}")
    return [line.rstrip() for line in lines]


def _figures(load: Load, served: Served) -> list[tuple[str, str, float]]:
    seconds = Latencies.of(load, served)
    found = [(f"first token p{q}", "s", float(np.quantile(seconds.first, q / 100))) for q in (50, 95)]
    if not np.isnan(seconds.token).all():
        found.append(("per token", "s", float(np.nanmean(seconds.token))))
    found += [(f"end to end p{q}", "s", float(np.quantile(seconds.whole, q / 100))) for q in (50, 95)]
    found.append(("throughput", "tokens/s", float(load.output.sum()) / served.makespan_s))
    found.append(("put back", "times", float(served.preempted)))
    if load.prefixes:
        found.append(("prompt tokens cached", "", float(served.cached.sum())))
    return found


def _remarks(before: float, after: float) -> tuple[str, ...]:
    remarks = [
        f"passes tried just before and just after the run took {before:.2f} and {after:.2f} times what was timed for "
        f"the plan; the prediction plays at {(before + after) / 2:.2f}"
    ]
    if abs(after / before - 1.0) > TOLERANCE:
        remarks.append("this machine's pace changed while the job ran, which no forecast can know")
    return tuple(remarks)


def _outputs(load: Load, served: Served) -> list[dict[str, Any]]:
    seconds = Latencies.of(load, served)
    return [
        {
            "prompt_tokens": int(load.prompt[i]),
            "tokens": int(load.output[i]),
            "cached_tokens": int(served.cached[i]),
            "first_token_s": float(seconds.first[i]),
            "token_s": None if np.isnan(seconds.token[i]) else float(seconds.token[i]),
            "latency_s": float(seconds.whole[i]),
        }
        for i in range(len(load))
    ]
