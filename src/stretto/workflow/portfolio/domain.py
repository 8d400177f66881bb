"""The portfolio domain: which policy finishes a workflow inside its budget and deadline, and how probably.

`run` carries the workflow out on the real clock, with attempts that take the time and have the outcomes of one trial of
the estimates: a rehearsal of the very lines that run real models.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from itertools import product

import numpy as np

from stretto.core.clock import Clock, RealClock, simulate_async
from stretto.core.plan import Context, Machines, Metric, Plan, Prediction, Progress, Refusal, Result
from stretto.core.record import Recorder
from stretto.core.statistics import Interval, bootstrap
from stretto.core.trace import Key, Trace
from stretto.workflow.portfolio.grid import forecast
from stretto.workflow.portfolio.job import PortfolioJob, PortfolioPlan
from stretto.workflow.portfolio.outcome import Run
from stretto.workflow.portfolio.planner import MCPP
from stretto.workflow.portfolio.run import run
from stretto.workflow.portfolio.simulate import Simulated, simulate
from stretto.workflow.portfolio.simulated import SimulatedAttempts

_POLL_S = 0.05
_MISSED = {"budget_exhausted": "ran out of money", "deadline_exhausted": "ran out of time", "stalled": "stalled"}


class PortfolioDomain:
    """See `stretto.core.plan.Domain`."""

    name = "portfolio"
    job_type: type = PortfolioJob
    plan_type: type = PortfolioPlan

    def candidates(self, job: PortfolioJob, cluster: Machines) -> Iterable[PortfolioPlan]:
        yield PortfolioPlan()
        for model, count in product(job.problem.estimates.models, job.levels):
            yield PortfolioPlan(policy="seq", model=model, count=count)

    def check(self, job: PortfolioJob, plan: PortfolioPlan, cluster: Machines) -> Refusal | None:
        known = job.problem.estimates
        if plan.policy == "seq" and plan.model not in known.models:
            right = f"model: {', '.join(known.models)}"
            return Refusal(reason=f"no step may be tried on {plan.model}", nearest=right)
        laws = {
            node: (known.law(node, plan.model),) if plan.policy == "seq" else tuple(models.values())
            for node, models in known.laws.items()
        }
        count = max(1, plan.count)
        least = count * sum(min(law.bound for law in each) for each in laws.values())
        if least > job.budget and not math.isclose(least, job.budget, rel_tol=1e-12):  # sums of tenths
            samples = "one sample" if count == 1 else f"{count} samples"
            reason = f"{samples} of each step may cost {least:.4g} USD, more than {job.budget:.4g} USD"
            return Refusal(reason=reason, nearest=f"budget: {least:.4g}")
        ends = dict[str, float]()
        for node in job.problem.workflow.order:
            before = max((ends[parent] for parent in job.problem.workflow.parents(node)), default=0.0)
            ends[node] = before + min(law.latency_s[0] for law in laws[node])
        shortest = max(ends.values())
        if shortest > job.deadline_s:
            reason = f"the longest path takes {shortest:.4g} s at least, more than {job.deadline_s:.4g} s"
            return Refusal(reason=reason, nearest=f"deadline_s: {shortest:.4g}")
        return None

    def objective(self, job: PortfolioJob) -> str:
        return "completion"

    def higher_is_better(self, job: PortfolioJob) -> bool:
        return True

    def bound(self, job: PortfolioJob, plan: PortfolioPlan, cluster: Machines) -> float:
        return 100.0

    def simulate(self, job: PortfolioJob, plan: PortfolioPlan, cluster: Machines) -> Prediction:
        found = simulate(job.problem, plan.of(job), job.budget, job.deadline_s, trials=job.trials, seed=job.seed)
        return Prediction(
            metrics=_metrics(found),
            bottleneck=_bottleneck(found),
            assumed=f"samples do as the estimates say; {job.trials} simulated runs",
            trace=trace_of(_rehearsed(job, plan, _trial(found)), "simulated"),
            table=_grid(job) if plan.policy == "mcpp" else "",
        )

    def prepare(self, job: PortfolioJob, cluster: Machines, progress: Progress) -> Machines:
        return cluster

    def run(self, plan: Plan[PortfolioJob, PortfolioPlan], ctx: Context) -> Result:
        job, choices = plan.job, plan.choices
        forecast = self.simulate(job, choices, plan.cluster)
        trial = ctx.seed

        async def main() -> Run:
            stop = asyncio.Event()
            running = asyncio.ensure_future(_carry_out(job, choices, RealClock(), trial, stop))
            while not running.done():
                if ctx.cancelled():
                    stop.set()
                await asyncio.wait([running], timeout=_POLL_S)
            return await running

        found = asyncio.run(main())
        measured, predicted = trace_of(found, "measured"), trace_of(_rehearsed(job, choices, trial), "simulated")
        summary = f"{found.end} after {found.seconds:.3g} s for {found.spent:.4g} of {job.budget:.4g} USD"
        return Result(
            plan=plan,
            outputs=tuple(
                {
                    "step": sample.node,
                    "model": sample.model,
                    "start_s": sample.start_s,
                    "seconds": sample.end_s - sample.start_s,
                    "cost": sample.cost,
                    "success": sample.success,
                    "how": sample.how,
                }
                for sample in found.samples
            ),
            said=(("", summary),),
            measured=measured,
            predicted=predicted,
            forecast=forecast,
            comparison=predicted.compare(measured),
            interrupted=found.end == "cancelled",
        )


async def _carry_out(
    job: PortfolioJob, plan: PortfolioPlan, clock: Clock, trial: int, stop: asyncio.Event | None = None
) -> Run:
    problem = job.problem
    attempts = SimulatedAttempts(problem, clock, seed=job.seed)
    limits = {"budget": job.budget, "deadline_s": job.deadline_s}
    return await run(problem, plan.of(job), attempts, clock=clock, seed=trial, stop=stop, **limits)


def _rehearsed(job: PortfolioJob, plan: PortfolioPlan, trial: int) -> Run:
    """The same run on virtual time."""
    return simulate_async(lambda clock: _carry_out(job, plan, clock, trial))


def trace_of(found: Run, source: str) -> Trace:
    """A lane a step with a span for each of its launches, and beside it the life of each sample."""
    recorder = Recorder(source)
    launches = dict[tuple[str, str, float], float]()
    for sample in found.samples:
        key = (sample.node, sample.model, sample.start_s)
        launches[key] = max(launches.get(key, 0.0), sample.end_s)
        recorder.request(f"{sample.node} samples", sample.start_s, sample.end_s, Key(sample.model))
    numbers = dict[str, int]()
    for (node, model, start_s), end_s in sorted(launches.items(), key=lambda item: item[0][2]):
        numbers[node] = numbers.get(node, -1) + 1
        recorder.span(node, start_s, end_s, Key(model, step=numbers[node]))
    spent = 0.0
    for sample in found.samples:
        spent += sample.cost
        recorder.counter("USD spent", sample.end_s, spent)
    return recorder.trace()


def _grid(job: PortfolioJob) -> str:
    """How probably it would be finished with less and with more of both limits."""
    if not (job.budget and job.deadline_s):
        return ""
    around = [(0.25, 0.5, 1.0, 2.0, 4.0), (0.5, 0.75, 1.0, 1.5, 3.0)]
    budgets, deadlines_s = (
        [limit * k for k in times] for limit, times in zip((job.budget, job.deadline_s), around, strict=True)
    )
    cells = forecast(MCPP(job.problem, levels=job.levels, seed=job.seed), budgets, deadlines_s)
    return f"finished, at least, within a budget and a deadline:\n{cells.table('USD')}"


def _trial(found: Simulated) -> int:
    """The first trial that completed, or the first one."""
    return int(np.argmax(found.completed))


def _metrics(found: Simulated) -> dict[str, Metric]:
    seconds, spent = _mean(found.seconds), _mean(found.spent)
    rate = found.probability
    an_hour = 3600 / max(float(found.seconds.mean()), 1e-9)
    return {
        "completion": Metric(value=rate.scaled(100.0), unit="%", higher_is_better=True),
        "makespan": Metric(value=seconds, unit="s"),
        "cost": Metric(value=spent, unit="USD"),
        "throughput": Metric(value=rate.scaled(an_hour), unit="runs/h", higher_is_better=True),
    }


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Interval:
    return bootstrap(values, np.mean, resamples=200)


def _bottleneck(found: Simulated) -> str:
    missed = [f"{found.ends[end]} {what}" for end, what in _MISSED.items() if found.ends[end]]
    return f"of {len(found.completed)} runs " + (", ".join(missed) or "none missed its limits")


domain = PortfolioDomain()
