"""Carrying declared steps out on the real clock: from a plan, or from Python with tools of one's own."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, overload

from stretto.core.clock import RealClock
from stretto.core.durable import DurableLog
from stretto.core.errors import UserError
from stretto.core.graph import Failure
from stretto.core.plan import Context, Plan, Prediction, Result
from stretto.workflow.job import WorkflowJob, amount, duration_s
from stretto.workflow.literals import text_of
from stretto.workflow.plan import WorkflowPlan
from stretto.workflow.portfolio.job import PortfolioJob
from stretto.workflow.portfolio.outcome import Attempt, Run
from stretto.workflow.portfolio.planner import MCPP
from stretto.workflow.portfolio.run import run as run_portfolio
from stretto.workflow.portfolio.simulated import SimulatedAttempts
from stretto.workflow.predict import play
from stretto.workflow.steps import Outcome, Steps, problem_of
from stretto.workflow.tool import Tool, tools_by_name

Limited = TypeVar("Limited", WorkflowJob, PortfolioJob)
_POLL_S = 0.05
_SHOWN_CHARACTERS = 400


def with_limits(job: Limited, budget: str | float | None, deadline: str | float | None) -> Limited:
    """The job within a budget (`"0.30 USD"`) and a deadline (`"60 s"`); None leaves the job's own."""
    if budget is not None:
        job = replace(job, budget=amount(budget))
    return job if deadline is None else replace(job, deadline_s=duration_s(deadline))


@overload
def run(
    job: WorkflowJob,
    *,
    tools: Sequence[Tool] = (),
    budget: str | float | None = None,
    deadline: str | float | None = None,
) -> Outcome: ...
@overload
def run(
    job: PortfolioJob,
    *,
    attempt: Attempt | None = None,
    budget: str | float | None = None,
    deadline: str | float | None = None,
) -> Run: ...
def run(
    job: WorkflowJob | PortfolioJob,
    *,
    tools: Sequence[Tool] = (),
    attempt: Attempt | None = None,
    budget: str | float | None = None,
    deadline: str | float | None = None,
) -> Outcome | Run:
    """Run a job here: a workflow's steps, or a portfolio, planned anew by Monte Carlo at every result.

    Args:
        tools: of a workflow, beside those that are built in.
        attempt: of a portfolio, one sample of a step on a model; left out, samples do as the job's estimates say.
        budget, deadline: in place of the job's own, as `"0.30 USD"` and `"60 s"`.

    Raises:
        UserError: if a step calls a tool that there is not, or not as it is to be called.
    """
    if isinstance(job, PortfolioJob):
        return asyncio.run(_portfolio(with_limits(job, budget, deadline), attempt))
    limited = with_limits(job, budget, deadline)
    problem = problem_of(limited, tools_by_name(tools))
    if problem is not None:
        raise UserError(problem[0], field="steps", right=problem[1])
    return carry_out(limited, job.max_parallel, tools=tools)


async def _portfolio(job: PortfolioJob, attempt: Attempt | None) -> Run:
    clock = RealClock()
    return await run_portfolio(
        job.problem,
        MCPP(job.problem, levels=job.levels, seed=job.seed),
        attempt or SimulatedAttempts(job.problem, clock, seed=job.seed),
        budget=job.budget,
        deadline_s=job.deadline_s,
        clock=clock,
        seed=job.seed,
    )


def carry_out(
    job: WorkflowJob,
    max_parallel: int | None,
    *,
    tools: Sequence[Tool] = (),
    ended: Callable[[str, Any], None] = lambda name, outcome: None,
    cancelled: Callable[[], bool] | None = None,
) -> Outcome:
    """All steps on the real clock, until they have ended, the deadline passes, or `cancelled` says so."""

    async def main(log: DurableLog | None) -> Outcome:
        steps = Steps(job, RealClock(), max_parallel=max_parallel, tools=tools, log=log, ended=ended)
        running = asyncio.ensure_future(steps.run())
        while cancelled is not None and not running.done():
            if cancelled():
                steps.cancel()
                break
            await asyncio.wait([running], timeout=_POLL_S)
        return await running

    with _log(job) as log:
        return asyncio.run(main(log))


@contextmanager
def _log(job: WorkflowJob) -> Iterator[DurableLog | None]:
    if job.log is None:
        yield None
    else:
        of = hashlib.blake2b(repr((job.steps, job.sources)).encode(), digest_size=16).hexdigest()
        with DurableLog(job.log, of=of) as log:
            yield log


def run_plan(plan: Plan[WorkflowJob, WorkflowPlan], forecast: Prediction, ctx: Context) -> Result:
    """Run a plan, and lay the forecast beside what happened."""
    job, done = plan.job, set[str]()

    def ended(name: str, outcome: Any) -> None:
        done.add(name)
        waiting = ", ".join(step.name for step in job.steps if step.name not in done)
        told = waiting if len(waiting) <= 60 else waiting[:57] + "..."
        ctx.progress(f"steps: {told or 'all done'}", len(done), len(job.steps))

    outcome = carry_out(
        replace(job, seed=job.seed + ctx.seed), plan.choices.max_parallel, ended=ended, cancelled=ctx.cancelled
    )
    predicted = play(job, plan.choices.max_parallel).trace
    return Result(
        plan=plan,
        outputs=tuple(_output(outcome, step.name) for step in job.steps),
        said=tuple((step.name, _shown(outcome.results[step.name])) for step in job.steps),
        measured=outcome.trace,
        predicted=predicted,
        forecast=forecast,
        comparison=predicted.compare(outcome.trace),
        interrupted=outcome.ended == "cancelled",
        remarks=(_remark(job, outcome),),
    )


def _output(outcome: Outcome, name: str) -> dict[str, Any]:
    result, usage = outcome.results[name], outcome.usage[name]
    failed = isinstance(result, Failure)
    return {
        "step": name,
        "result": None if failed else result,
        "failure": str(result) if failed else None,
        "tokens": usage.prompt_tokens + usage.completion_tokens,
        "cost": usage.cost,
    }


def _shown(result: Any) -> str:
    text = str(result) if isinstance(result, Failure) else text_of(result)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _remark(job: WorkflowJob, outcome: Outcome) -> str:
    failed = sum(isinstance(result, Failure) for result in outcome.results.values())
    limits = [f"a budget of {job.budget:g}"] if job.budget is not None else []
    limits += [f"a deadline of {job.deadline_s:g} s"] if job.deadline_s is not None else []
    within = f", within {' and '.join(limits)}" if limits else ""
    count = f"{len(job.steps) - failed} of {len(job.steps)} steps gave a result"
    beyond = f", and {outcome.overrun:.4g} was charged beyond what calls may cost" if outcome.overrun else ""
    return f"{outcome.ended}: {count}; spent {outcome.spent:.4g}{within}{beyond}"
