"""What a plan would take: the executor itself on virtual time, in front of twins of the tools."""

from __future__ import annotations

from dataclasses import replace

from stretto.core.clock import simulate_async
from stretto.core.plan import Metric, Prediction, Refusal
from stretto.core.statistics import Interval
from stretto.workflow.job import WorkflowJob
from stretto.workflow.plan import WorkflowPlan
from stretto.workflow.steps import Outcome, Steps, problem_of


def play(job: WorkflowJob, max_parallel: int | None) -> Outcome:
    """The simulated run."""
    return simulate_async(lambda clock: Steps(job, clock, max_parallel=max_parallel).run())


def check(job: WorkflowJob, plan: WorkflowPlan) -> Refusal | None:
    """Why the job cannot be run so: an unknown tool, or limits that the forecast does not keep."""
    problem = problem_of(job, {})
    if problem is not None:
        return Refusal(reason=problem[0], nearest=problem[1])
    if job.max_parallel is not None and plan.max_parallel != job.max_parallel:
        return Refusal(reason=f"the job runs {job.max_parallel} steps at once", nearest=f"run {job.max_parallel}")
    free = play(replace(job, budget=None, deadline_s=None), plan.max_parallel)
    if job.deadline_s is not None and free.trace.makespan > job.deadline_s:
        return Refusal(
            reason=f"takes {free.trace.makespan:.3g} s, and the deadline is {job.deadline_s:g} s",
            nearest=f"allow {free.trace.makespan:.3g} s",
        )
    if job.budget is not None and free.spent > job.budget:
        return Refusal(
            reason=f"costs {free.spent:.4g}, and the budget is {job.budget:g}", nearest=f"allow {free.spent:.4g}"
        )
    return None


def predict(job: WorkflowJob, plan: WorkflowPlan) -> Prediction:
    """Seconds, money and steps a second of a run in which nothing fails."""
    outcome = play(job, plan.max_parallel)
    seconds = Interval.exact(outcome.trace.makespan)
    longest = max(outcome.trace.critical_seconds.items(), key=lambda item: item[1], default=("nothing", 0.0))
    steps = len(outcome.trace) / seconds.value if seconds.value > 0 else 0.0
    return Prediction(
        metrics={
            "seconds": Metric(value=seconds, unit="s"),
            "cost": Metric(value=Interval.exact(outcome.spent), unit=""),
            "throughput": Metric(value=Interval.exact(steps), unit="steps/s", higher_is_better=True),
        },
        bottleneck=f"step {longest[0]}, {longest[1]:.3g} s of the critical path",
        assumed="no step fails; answers of the expected length; seconds as the job gives them",
        phases=outcome.trace.critical_seconds,
        trace=outcome.trace,
    )
